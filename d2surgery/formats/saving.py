"""What writers share: a file that stands whole or not at all, and factors brought to one rank and scaling."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.errors import Problem
from d2surgery.files.whole import PARTIAL
from d2surgery.formats.layout import Layout

UNFINISHED = ".adapter_model."  # how the name of a directory begins in which weights are written


@contextmanager
def saving(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[None]:
    """Tensors written beside a path, which they take when the block is done: what stands there describes them then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=UNFINISHED, suffix=PARTIAL, dir=path.parent) as beside:  # where nobody lays links
        weights = Path(beside) / path.name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata=dict(metadata))
        _sort_metadata(weights)
        yield
        weights.replace(path)


def brought_to(adapter: Adapter, rank: int, scaling: float) -> dict[str, Tensor]:
    """Slots of the same update with another scaling and no smaller rank: A and B padded with zeros, B rescaled.

    B is in float32 where its dtype does not hold the product.
    """
    slots, missing = adapter.slots(), rank - adapter.slots()["A"].shape[0]
    B = slots["B"]
    if float(adapter.scaling) != scaling:
        exact = B.double() * (float(adapter.scaling) / scaling)
        cast = exact.to(B.dtype)
        B = cast if torch.equal(cast.double(), exact) else exact.float()
    if missing:
        pad = torch.nn.functional.pad
        slots["A"], B = pad(slots["A"], (0, 0, 0, missing)), pad(B, (0, missing))
    return slots | {"B": B}


def common(layout: Layout) -> tuple[int, float]:
    """The largest rank, and the scaling that most modules have and none need lose for it."""
    entries = layout.adapters.values()
    counts = Counter(float(entry.scaling) for entry in entries if entry.scaling)
    return max((entry.ranks["update"] for entry in entries), default=1), (counts.most_common(1) or [(1.0, 0)])[0][0]


def held_whole(layout: Layout, name: str) -> Iterator[Problem]:
    """What formats of factors alone cannot hold: replaced tensors, token rows, additions to biases."""
    found = {
        **dict.fromkeys(layout.replacements, "a tensor saved in full"),
        **dict.fromkeys(layout.rows, "token rows"),
        **{module: "an addition to a bias" for module, entry in layout.adapters.items() if "bias" in entry.slots},
    }
    for module, what in found.items():
        yield Problem(code="FORMAT_CANNOT_HOLD", message=f"{name} has no place for {what}", module=module)


def _sort_metadata(file: Path) -> None:
    """safetensors writes metadata in an order of chance: sorted, the same adapter is the same file, hash and all. On
    disk, before it takes its name."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same entries in another order, padded with spaces
        stream.seek(8)
        stream.write(text.ljust(length))
        stream.flush()
        os.fsync(stream.fileno())
