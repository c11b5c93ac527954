"""Merge an adapter into a base: W0 + strength·delta, streamed by row tiles, rounded once, published whole.

Everything that can be known from names, shapes and the adapter's own numbers is checked before a byte is written.
Torch is imported by the functions, when names and shapes have been found to fit.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from d2surgery.cards import RECEIPT
from d2surgery.errors import Problem
from d2surgery.files.dtypes import dtype_name
from d2surgery.files.kept import KeptHashes
from d2surgery.files.partial import Partial, Sources
from d2surgery.formats.layout import Reading
from d2surgery.machine import one_thread, peak_memory, resident_memory, uncollected
from d2surgery.merging.ahead import HashAhead
from d2surgery.merging.companions import Companions, Tokenizer, find_companions
from d2surgery.placement.bases import other_base
from d2surgery.placement.fit import Fit, fit

if TYPE_CHECKING:
    import torch

    from d2surgery.measures.fidelity import Survival

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class MergeReport:
    """What merge wrote, and which files of the base's directory are copied beside the weights and which are left."""

    out: str
    tensors_written: int
    bytes_written: int
    modules_merged: int
    seconds: float
    peak_memory_bytes: int
    receipt: str
    copied: tuple[str, ...]
    left: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, repr=False)
class PlanReport:
    """What merge would do."""

    out: str
    tensors: int
    bytes: int
    disk_free_bytes: int
    peak_memory_bytes: int
    shards: int
    modules: int
    untied: bool
    survival: Mapping[str, Mapping[str, "Survival"]]  # module -> dtype -> survival
    copied: tuple[str, ...]
    left: tuple[str, ...]
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        return (
            f"PlanReport({self.modules} modules into {self.tensors} tensors, {self.bytes} bytes in {self.shards} files)"
        )


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype | None" = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    tokenizer: Tokenizer = "adapter",
    resume: bool = False,
    verify: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **reading: Unpack[Reading],
) -> MergeReport:
    """Write `base` with `adapter` merged into it to the directory `out`, which transformers then loads.

    merged = round(W0 + strength·delta), computed one precision above the output and rounded once to `dtype`
    ("bf16", torch.float32 …; None: each tensor keeps the base's). Nothing stands at `out` until all is written.

    max_memory: bytes of resident memory that may be used. shard_size: bytes per output file. tokenizer: whose stands
    beside the weights, "adapter"'s where it brings one or "base"'s. resume: continue an interrupted merge with the same
    arguments. verify: False neither hashes nor fsyncs; True hashes a base again that an earlier merge hashed (see
    `files.kept`). progress(done, total) is called with bytes. reading: what a file does not say, see `Reading`.

    One process writes to an output (see `files.lock`). What is read is what was hashed, or the merge ends. The output
    is no more open to other users than the base and the adapter are.

    Raises D2SurgeryError with every misfit at once, before anything is written: what `load` and `sites` find,
    NOT_FINITE, STRENGTH, OUTPUT_EXISTS, OUTPUT_IN_USE, RESUME_MISMATCH, DISK_FULL, MEMORY; while merging ZERO_NORM,
    NOT_FINITE, BASE_CHANGED, ADAPTER_CHANGED and COMPANION_CHANGED.
    """
    began = time.monotonic()
    fitted, companions = _fitted(base, adapter, tokenizer, strength, reading)
    hashing = verify is not False
    kept = KeptHashes(fitted.computed if hashing else {}, again=verify is True)
    with Partial(Path(out), sync=hashing, sources=_sources(fitted, companions)) as partial:
        partial.claim(resume=resume)
        with HashAhead({} if "torch" in sys.modules else kept.unknown) as ahead:
            with uncollected():  # torch, which leaves cores for hashing
                from d2surgery.merging.job import write
                from d2surgery.merging.prepared import prepare

            prepared = prepare(fitted, dtype_name(dtype), device, tokenizer)
            how = (max_memory, shard_size, hashing, progress)
            written = write(prepared, partial, companions, lambda: kept.known | ahead.stop(), *how)
    kept.keep(written.inputs)
    return MergeReport(
        out=str(out),
        tensors_written=len(prepared.outputs),
        bytes_written=written.nbytes,
        modules_merged=len(fitted.layout.adapters),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
        receipt=str(Path(out) / RECEIPT),
        copied=companions.copied,
        left=companions.left,
        problems=written.problems,
    )


def plan(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype | None" = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    tokenizer: Tokenizer = "adapter",
    dtypes: tuple[str, ...] = ("BF16", "F16"),
    progress: Callable[[int, int], None] = lambda done, total: None,
    **reading: Unpack[Reading],
) -> PlanReport:
    """What `merge` with the same arguments would do, and how much of each module's delta would survive in `dtypes`.

    Reads the adapted tensors once or twice, writes nothing. Raises what merge raises before it writes.
    """
    fitted, companions = _fitted(base, adapter, tokenizer, strength, reading)
    with uncollected():  # torch
        from d2surgery.files.writer import free_space, shards
        from d2surgery.merging.forecast import forecast, low_survival, zero_updates
        from d2surgery.merging.prepared import prepare

    prepared = prepare(fitted, dtype_name(dtype), device, tokenizer)
    files = shards((output.entry for output in prepared.outputs), shard_size)
    with one_thread():
        zero = prepared.check_adapter(hashes=False).zero
        threads = prepared.threads(max_memory)
        found = forecast(prepared, threads, dtypes, progress)
    prepared.refuse_changes()
    return PlanReport(
        out=str(out),
        tensors=len(prepared.outputs),
        bytes=sum(shard.nbytes for shard in files),
        disk_free_bytes=free_space(Path(out)),
        peak_memory_bytes=max(peak_memory(), resident_memory() + threads * prepared.memory_of_one()),
        shards=len(files),
        modules=len(fitted.layout.adapters),
        untied=fitted.landing.untied,
        survival=found,
        copied=companions.copied,
        left=companions.left,
        problems=(*fitted.problems, *zero_updates(prepared, zero), *low_survival(prepared, found)),
    )


def _fitted(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    tokenizer: Tokenizer,
    strength: float,
    reading: Reading,
) -> tuple[Fit, Companions]:
    """The fit, with what is said of the files beside the weights, and these."""
    found = fit(base, adapter, strength, **reading)
    companions = find_companions(found, tokenizer)
    said = (*companions.problems, *other_base(found.layout.base_model, found.base.directory, found.base.config))
    return replace(found, problems=(*found.problems, *said)), companions


def _sources(fitted: Fit, companions: Companions) -> Sources:
    directories = (fitted.base.directory, fitted.layout.path.parent)
    files = (*fitted.base.seen, *fitted.layout.header.seen, *companions.files.values())
    return Sources(tuple(path.stat() for path in directories), tuple(file.found for file in files))
