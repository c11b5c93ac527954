"""What transformers makes of a directory of weights: which of its files it takes, and where their tensors land."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2surgery.auditing.findings import several
from d2surgery.errors import D2SurgeryError, Problem, Severity, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.checkpoints import USUAL, find_weights
from d2surgery.files.header import Header, TensorInfo, read_header
from d2surgery.files.locate import PICKLES, WEIGHTS
from d2surgery.files.reading import read_json
from d2surgery.placement.renaming import Renaming

ADAPTER_CONFIG = "adapter_config.json"
_INDEX = ".index.json"
_PIECE = 1 << 20
USUAL_PREFIXES = ("model.", "transformer.")
"""Of most models inside one with a head: what transformers adds or takes away, where it cannot be asked."""
_ANEW = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Buffers that older checkpoints hold; a model that has such makes them anew and takes them from no file."""


# Which files ------------------------------------------------------------------------------------------------------


def open_merged(directory: str | os.PathLike[str]) -> BaseWeights:
    """The checkpoint to be judged. Raises BAD_MERGED for an adapter or what is no directory of weights."""
    path = Path(directory)
    if not path.is_dir():
        raise refuse("BAD_MERGED", "not a directory", file=str(path))
    weights = find_weights(path)
    held = [name for name in WEIGHTS if (path / name).is_file()]
    if weights is None or weights.name in held:
        other = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES, ".gguf"))
        what = "it holds an adapter" if held else "no model.safetensors and no index"
        raise refuse("BAD_MERGED", what, file=str(path), got=several(other))
    try:
        found = BaseWeights(path, as_loaded=True, dequantized=True)
    except D2SurgeryError as error:
        raise D2SurgeryError(
            *(replace(p, code="BAD_MERGED") if p.code == "BAD_BASE" else p for p in error.problems)
        ) from None
    if not found.header.tensors:
        raise refuse("BAD_MERGED", "it holds no tensors", file=str(path))
    return found


def directory_problems(merged: BaseWeights, base: BaseWeights | None) -> list[Problem]:
    """What lies in a merged directory and is loaded on top of the weights, instead of them, or not at all.

    Weights under a name that transformers does not look for fail, unless the base's have the same.
    """
    return [*merged.header.problems, *_adapter(merged.directory), *_loadable(merged, base), *_unread(merged)]


def _adapter(directory: Path) -> Iterator[Problem]:
    """An adapter's config makes transformers apply that adapter on top of the weights; a lone file of one does not."""
    there = [name for name in (ADAPTER_CONFIG, *WEIGHTS) if (directory / name).is_file()]
    if there:
        config = there[0] == ADAPTER_CONFIG
        message = "transformers applies it once more on loading" if config else "not applied without a config"
        severity: Severity = "error" if config else "warning"
        yield Problem(code="ADAPTER_BESIDE", severity=severity, message=message, file=", ".join(there))


def _loadable(merged: BaseWeights, base: BaseWeights | None) -> Iterator[Problem]:
    """Weights that transformers would not find, or whose index it cannot read."""
    found, of_base = find_weights(merged.directory), find_weights(base.directory) if base else None
    assert found is not None  # its header was read
    if (merged.directory / ".metadata").is_file():
        yield _not_loaded("transformers takes the distributed checkpoint of .metadata instead of these weights", found)
    if found.suffix != ".gguf" and found.name not in (*USUAL, merged.config.get("transformers_weights")):
        severity: Severity = "warning" if of_base is not None and of_base.name == found.name else "error"
        message = "transformers looks for no file of this name"
        yield _not_loaded(message, found, severity=severity, wanted=" or ".join(USUAL))
    if found.name.endswith(_INDEX) and not isinstance(read_json(found).get("metadata"), dict):
        yield _not_loaded("the index has no metadata, without which transformers does not load", found)


def _not_loaded(message: str, found: Path, **details: Any) -> Problem:
    return Problem(code="CANNOT_LOAD", message=message, file=found.name, **details)


def _unread(merged: BaseWeights) -> Iterator[Problem]:
    """Other weights in the directory: a note where they hold the same, a warning where they do not."""
    read = {file.name for file in merged.header.files}
    files = [path for ending in (".safetensors", ".bin") for path in sorted(merged.directory.glob(f"*{ending}"))]
    for path in files:
        if path.name not in (*read, *WEIGHTS) and (held := _header(path)) is not None:
            same = _same(held, merged.header.tensors)
            severity: Severity = "info" if same else "warning"
            message = "it holds the same" if same else "it is not loaded, and holds something else"
            yield Problem(code="TWO_SETS_OF_WEIGHTS", severity=severity, message=message, file=path.name)


def _header(path: Path) -> Header | None:
    """Of a file of tensors; None for what is none, such as a trainer's state."""
    try:
        if path.suffix == ".safetensors":
            return read_header(path)
        from d2surgery.files.pickled import locate_pickled  # torch, only where a pickle lies there

        return locate_pickled(path)
    except D2SurgeryError:
        return None


def _same(held: Header, tensors: Mapping[str, TensorInfo]) -> bool:
    return all(name in tensors and _same_bytes(info, tensors[name]) for name, info in held.tensors.items())


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    from d2surgery.files.tensors import read_part  # torch, where other weights lie there

    pieces = bytearray(_PIECE), bytearray(_PIECE)
    for start in range(0, one.nbytes, _PIECE):
        views = [memoryview(piece)[: min(_PIECE, one.nbytes - start)] for piece in pieces]
        for info, view in zip((one, other), views, strict=True):
            read_part(info, start, view)
        if views[0] != views[1]:
            return False
    return True


# Which names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The names of a model of transformers, by which it takes tensors from a file."""

    parameters: frozenset[str]  # persistent buffers, too
    prefix: str  # of the model inside one with a head, which may stand in the file or not
    ignored: re.Pattern[str]  # names that it takes from no file and does not miss
    renaming: Renaming

    def places(self, names: Iterable[str]) -> dict[str, str | None]:
        """Name in the file -> where it lands; None for what transformers leaves unread.

        Of parts that are joined, or of one that is cut, it is the part's name as it would stand in the model.
        """
        names = list(names)
        guards = self.renaming.guards(names)
        return {name: self._place(name, guards) for name in names}

    def _place(self, name: str, guards: frozenset[int]) -> str | None:
        part = self.renaming.name(name, guards)
        parameter = self.renaming.targets(part)[0]
        place = self._with_prefix(parameter)
        if place not in self.parameters and name in self.parameters:
            return self._with_prefix(name)
        if place not in self.parameters:
            return None
        if len(place) >= len(parameter):
            return place.removesuffix(parameter) + part
        return part.removeprefix(parameter.removesuffix(place))

    def _with_prefix(self, name: str) -> str:
        """As transformers does it: the prefix goes where the rest is known, and comes where it is missing."""
        rest = name.removeprefix(f"{self.prefix}.")
        if rest != name and rest in self.parameters:
            return rest
        longer = f"{self.prefix}.{name}"
        return longer if longer in self.parameters else name


def model_of(merged: BaseWeights, architectures: Any) -> Model | str:
    """The model that the merged directory's config is of, built without memory; a sentence where it cannot be built.

    `architectures`: the classes that the config should name, of which the first has the head.
    """
    import torch
    import transformers  # a second, and only where names differ

    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    kind = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if kind is None:
        return f"transformers has no architecture {name!r}" if name else "config.json names no architecture"
    try:
        config = transformers.AutoConfig.from_pretrained(
            merged.directory, local_files_only=True, trust_remote_code=False
        )
        if not isinstance(config, kind.config_class):
            return f"{name} takes no config of the model type {merged.config.get('model_type')!r}"
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # what a config of any content makes transformers raise
        return f"transformers cannot build {name}: {next(iter(str(error).splitlines()), type(error).__name__)[:200]}"
    buffers = [name for name, _ in model.named_buffers()]
    anew = [pattern for ending, pattern in _ANEW.items() if any(name.endswith(ending) for name in buffers)]
    patterns = [*anew, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())] or [r"(?!)"]
    return Model(
        parameters=frozenset(model.state_dict()),
        prefix=model.base_model_prefix,
        ignored=re.compile("|".join(f"({pattern})" for pattern in patterns)),
        renaming=Renaming(merged.config | {"architectures": architectures}),
    )


def other_names(matched: Mapping[str, str], *, taken: bool | None) -> Problem:
    """What is said of tensors under other names: {right name: name in the file}. taken: whether transformers takes
    them all the same; None where it could not be asked."""
    right, name = next(iter(matched.items()))
    count = "1 tensor" if len(matched) == 1 else f"{len(matched)} tensors"
    if taken is False:
        message = f"{count} under names that transformers does not know: it starts what they should be at random"
        return Problem(code="WRONG_NAMES", message=message, wanted=right, got=several([*matched.values()]))
    how = "transformers takes" if taken else "transformers usually takes"
    message = f"{count} under another name, which {how} for the same"
    return Problem(code="NAME_MATCHED", severity="info", message=message, wanted=right, got=name)
