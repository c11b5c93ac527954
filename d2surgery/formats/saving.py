"""What writers share: a file that stands whole or not at all, never held whole, and factors brought to one rank and
scaling."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.errors import Problem
from d2surgery.files.tensors import NAMES, as_bytes
from d2surgery.files.whole import PARTIAL
from d2surgery.formats.layout import Layout

Parts = Callable[[], Iterable[tuple[str, Tensor]]]
"""All tensors of a file by name, made anew each time: once for their shapes, once to be written."""
UNFINISHED = ".adapter_model."  # how the name of a directory begins in which weights are written


@contextmanager
def saving(path: Path, parts: Parts, metadata: Mapping[str, str]) -> Iterator[None]:
    """Tensors written beside a path, which they take when the block is done: what stands there describes them then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=UNFINISHED, suffix=PARTIAL, dir=path.parent) as beside:  # where nobody lays links
        weights = Path(beside) / path.name
        _write(weights, parts, metadata)
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


def _write(file: Path, parts: Parts, metadata: Mapping[str, str]) -> None:
    """A safetensors file as safetensors itself lays it out, wider dtypes first, then by name; its save_file holds all
    of it twice, and writes metadata in an order of chance. On disk, before it takes its name."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    infos = {name: (tensor.dtype, list(tensor.shape), tensor.nbytes) for name, tensor in parts()}
    end = 0
    for name in sorted(infos, key=lambda name: (-infos[name][0].itemsize, name)):
        dtype, shape, nbytes = infos[name]
        start, end = end, end + nbytes
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, tensor in parts():
            assert (tensor.dtype, list(tensor.shape)) == infos[name][:2], name
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(as_bytes(tensor.cpu().contiguous()))
        stream.flush()
        os.fsync(stream.fileno())
