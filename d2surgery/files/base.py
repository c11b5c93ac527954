"""BaseWeights: the tensors of a model directory, read by row ranges with pread, never held or mapped."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, brief, found_in, raise_errors, refuse
from d2surgery.files.checkpoints import find_weights, read_checkpoint_header
from d2surgery.files.header import Header
from d2surgery.files.held import Seen, changes
from d2surgery.files.locate import locate_base
from d2surgery.files.mlx_base import FIELDS
from d2surgery.files.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_READ: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field of config.json that is read here -> what it may be
    "architectures": ("a list of names", lambda v: v is None or (isinstance(v, list) and all(map(_text, v)))),
    **dict.fromkeys(("model_type", "_name_or_path"), ("a name", _text)),
    **dict.fromkeys(
        ("text_config", "quantization_config", "id2label", "label2id"),
        ("an object", lambda v: v is None or isinstance(v, dict)),
    ),
    "tie_word_embeddings": ("true or false", lambda v: v is None or type(v) is bool),
    "vocab_size": ("a count", lambda v: v is None or (type(v) is int and v >= 0)),
}


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json of a model's directory; where there is none what its GGUF file says, or {}.

    Raises D2SurgeryError: what read_json raises, BAD_CONFIG with every field that is read and cannot be what it is.
    """
    path = directory / "config.json"
    if not path.exists():
        return _of_gguf(directory)
    config = read_json(path)
    text = config.get("text_config")
    parts = {"": config, "text_config.": text if isinstance(text, dict) else {}}
    raise_errors(
        Problem(code="BAD_CONFIG", message=f"{prefix}{name} cannot be used", file=str(path), wanted=wanted,
                got=brief(part[name]))
        for prefix, part in parts.items()
        for name, (wanted, fits) in _READ.items()
        if name in part and not fits(part[name])
    )  # fmt: skip
    return config


def _of_gguf(directory: Path) -> dict[str, Any]:
    found = find_weights(directory)
    if found is None or found.suffix != ".gguf":
        return {}
    from d2surgery.files.gguf_base import config_of, read_gguf_base

    return config_of(read_gguf_base(found))


def on_a_grid(header: Header) -> list[Problem]:
    """That tensors are quantised, by the grids that they lie on."""
    count = Counter(info.grid.name for info in header.tensors.values() if info.grid)
    if not count:
        return []
    message = ", ".join(f"{number} tensors in {name}" for name, number in count.most_common())
    return [Problem(code="QUANTIZED_BASE", message=message, file=str(header.files[0]))]


class BaseWeights(Mapping[str, "Tensor"]):
    """A Hugging Face model directory, or a hub id. Each access reads one tensor; `header` has names and shapes.

    as_loaded: where its index is wrong, what transformers would load all the same (`read_checkpoint_header`).
    dequantized: quantised tensors of GGUF and MLX are the numbers that they stand for, in float32, instead of refused.

    Raises D2SurgeryError BAD_BASE, MISSING_SHARD, HUB_UNREACHABLE, QUANTIZED_BASE or what read_header raises.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, as_loaded: bool = False, dequantized: bool = False
    ) -> None:
        self.directory = locate_base(directory)
        if not self.directory.is_dir():
            raise refuse("BAD_BASE", "not a directory", file=str(directory))
        config = self.directory / "config.json"
        beside = (Seen(config),) if config.exists() else ()  # before it is read
        self.header: Header = read_checkpoint_header(self.directory, as_loaded=as_loaded)
        self.seen = (*self.header.seen, *beside)
        if not dequantized:
            raise_errors(on_a_grid(self.header))

    def __repr__(self) -> str:
        return f"BaseWeights({str(self.directory)!r}, {len(self)} tensors in {len(self.header.files)} files)"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, without what it says of dequantised modules, or what a GGUF file says; {} for neither."""
        config = read_model_config(self.directory)
        if not any(info.grid and info.grid.scales for info in self.header.tensors.values()):
            return config
        return {name: value for name, value in config.items() if name not in FIELDS}

    def refuse_changes(self) -> None:
        """Raises D2SurgeryError BASE_CHANGED for every file that is not as it was when its header was read."""
        raise_errors(changes(self.seen, "BASE_CHANGED"))

    def __contains__(self, name: object) -> bool:
        return name in self.header.tensors

    def __getitem__(self, name: str) -> "Tensor":
        from d2surgery.files.tensors import read_tensor  # torch, which names and shapes do not need

        return read_tensor(found_in(self.header.tensors, name, "tensor", str(self.directory)))

    def rows(self, name: str, start: int, stop: int, *, of: int | None = None) -> "Tensor":
        """Rows `start` to `stop` of a tensor seen as a matrix of `of` rows (None: its first dimension), and only these
        read: (stop - start, elements / of) in the stored dtype.

        Of experts (experts, out, in), `of=experts * out` gives the rows of single ones.

        Raises D2SurgeryError USAGE for rows that are not there.
        """
        from d2surgery.files.tensors import read_rows

        info = self.header.tensors[name]
        count = (info.shape or (1,))[0] if of is None else of
        if not 0 <= start <= stop <= count or prod(info.shape) % max(count, 1):
            raise refuse(
                "USAGE", "no such rows", module=name, wanted=f"of {list(info.shape)}", got=f"{start} to {stop}"
            )
        return read_rows(info, start, stop, of=count)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)
