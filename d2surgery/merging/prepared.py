"""An adapter on the base that it fits, ready to be worked on: which outputs there are, and who merges their tiles.

Merging, planning and auditing begin here. Nothing is written.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch

from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.header import FLOATS, TensorInfo
from d2surgery.files.held import changes
from d2surgery.files.tensors import as_bytes, find_device
from d2surgery.machine import resident_memory, workers
from d2surgery.merging.companions import Tokenizer
from d2surgery.merging.tiles import Output, TileMerger, grid
from d2surgery.placement.fit import Fit
from d2surgery.placement.site import Site


class Checked(NamedTuple):
    """What reading an adapter once tells, by key."""

    hashes: Mapping[str, str]
    zero: frozenset[str]  # whose numbers are all zero


@dataclass(frozen=True)
class Prepared:
    """What is made of what, and by whom. `dtype`: of every floating-point output, None to keep the base's."""

    fit: Fit
    dtype: str | None
    tokenizer: Tokenizer
    merger: TileMerger
    outputs: tuple[Output, ...]

    def check_adapter(self, *, hashes: bool) -> "Checked":
        """Read every adapter tensor once: all finite, tied twins equal. Their sha256 only where `hashes`."""
        checkpoint = self.merger.checkpoint
        problems: list[Problem] = []
        digests: dict[str, str] = {}
        zero: set[str] = set()
        for key in sorted(self.fit.layout.header.tensors):
            tensor = checkpoint.tensor(key)
            if hashes:
                digests[key] = hashlib.sha256(as_bytes(tensor)).hexdigest()
            least, most = map(float, torch.aminmax(tensor)) if tensor.numel() else (0.0, 0.0)
            if least == most == 0:
                zero.add(key)
            elif not (isfinite(least) and isfinite(most)):
                problems.append(Problem(code="NOT_FINITE", message="NaN or infinity", module=key))
        for first, second in self.fit.landing.twins:
            a, b = checkpoint.tensor(first), checkpoint.tensor(second)
            if not (torch.equal(a, b) or torch.equal(a.T, b)):
                problems.append(Problem(code="TIE_BROKEN_BY_FILE", message=f"differs from {first}", module=second))
        raise_errors(problems)
        return Checked(digests, frozenset(zero))

    def refuse_changes(self) -> None:
        """Raises D2SurgeryError for every file that is not as it was when it was first read: BASE_CHANGED,
        ADAPTER_CHANGED."""
        base, adapter = self.fit.base.seen, self.fit.layout.header.seen
        raise_errors([*changes(base, "BASE_CHANGED"), *changes(adapter, "ADAPTER_CHANGED")])

    def threads(self, max_memory: int | None) -> int:
        """That merge a tensor each: no more than the memory allows."""
        count = workers()
        if max_memory is not None:
            used, each = resident_memory(), self.memory_of_one()
            if used + each > max_memory:
                want = f"at least {-(-(used + each) // 1_000_000)} MB"
                raise refuse("MEMORY", "too little for one tile", wanted=want, got=f"{max_memory // 1_000_000} MB")
            count = min(count, (max_memory - used) // max(each, 1))
        return count

    def memory_of_one(self) -> int:
        """About the bytes that a thread uses: a tile as stored and in the dtype of the work, open adapters."""
        largest = max((tile.nbytes for output in self.outputs for tile in grid(output)), default=0)
        widened = 2 if any(output.info.dtype in ("F32", "F64") for output in self.outputs) else 4
        patches = (patch for output in self.outputs if output.site for patch in output.site.patches)
        count = 6 if any(map(self.merger.crosses_tiles, patches)) else 4
        entries = self.fit.layout.adapters.values()
        sizes = [(entry.out_features + entry.in_features) * sum(entry.ranks.values()) for entry in entries]
        adapters = 3 * 24 * max(sizes, default=0)  # as stored, in float64, in the work's dtype
        return (1 + count * widened) * largest + adapters


def prepare(fit: Fit, dtype: str | None, device: str, tokenizer: Tokenizer = "adapter") -> Prepared:
    """Raises D2SurgeryError USAGE for a device that is not there."""
    merger = TileMerger(Checkpoint(fit.layout), fit.strength, find_device(device))
    return Prepared(fit, dtype, tokenizer, merger, tuple(_outputs(fit, dtype)))


def _outputs(fit: Fit, dtype: str | None) -> list[Output]:
    """The tensors of the merged checkpoint: the base's in the order in which they are read, then those it lacks."""
    base = fit.base.header.tensors
    order = sorted(base, key=lambda name: (base[name].file, base[name].start))
    usual = fit.base.header.usual_dtype or "F32"
    outputs = []
    for name in [*order, *(name for name in fit.landing.sites if name not in base)]:
        site = fit.landing.sites.get(name)
        info = _source(fit, name, site)
        stored = base[site.source].dtype if site and site.source else info.dtype if site is None else usual
        if info.dtype not in FLOATS:  # a counter that a saved module brings along
            stored = info.dtype
        outputs.append(Output(name, info, dtype if dtype and stored in FLOATS else stored, site))
    return outputs


def _source(fit: Fit, name: str, site: Site | None) -> TensorInfo:
    if site is not None and site.replacement:
        return fit.layout.header.tensors[site.replacement]
    return fit.base.header.tensors[site.source if site and site.source else name]
