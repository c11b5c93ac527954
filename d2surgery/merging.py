"""Merge an adapter into a base: W0 + strength·delta, streamed by row tiles, rounded once, published whole.

Everything that can be known from names, shapes and the adapter's own numbers is checked before a byte is written.
"""

import hashlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2surgery.base import BaseWeights
from d2surgery.checkpoint import Checkpoint, load
from d2surgery.companions import companions
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.header import FLOATS, TensorInfo
from d2surgery.layout import Layout
from d2surgery.measures.fidelity import Survival, survival
from d2surgery.sites import Landing, Site, sites
from d2surgery.tensors import DTYPES, as_bytes, find_device
from d2surgery.tiles import Output, Tile, TileMerger, all_finite, tiles
from d2surgery.writer import (
    Partial,
    Shard,
    ShardWriter,
    hash_tensors,
    index_file,
    pipeline,
    shards,
)

RECEIPT = "d2surgery_merge.json"
SHARD_SIZE = 5_000_000_000
_BUFFERS = 4


@dataclass(frozen=True)
class MergeReport:
    """What merge wrote. `survival` is filled by plan only."""

    out: str
    tensors_written: int
    bytes_written: int
    modules_merged: int
    seconds: float
    peak_memory_bytes: int
    receipt: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
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
    survival: Mapping[str, Mapping[str, Survival]]  # module -> dtype -> survival
    problems: tuple[Problem, ...]


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    resume: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write `base` with `adapter` merged into it to the directory `out`, which transformers then loads.

    merged = round(W0 + strength·delta), computed one precision above the output and rounded once to `dtype`
    ("F32", "BF16", "F16", "F64"; None: each tensor keeps the base's). Nothing stands at `out` until all is written.

    max_memory: bytes of resident memory that may be used. shard_size: bytes per output file. resume: continue an
    interrupted merge with the same arguments. verify=False writes no hashes and does not fsync.
    progress(done, total) is called with bytes written.

    Raises D2SurgeryError with every misfit at once, before anything is written: what `load` and `sites` find,
    NOT_FINITE, STRENGTH, OUTPUT_EXISTS, RESUME_MISMATCH, DISK_FULL, MEMORY; while merging ZERO_NORM and NOT_FINITE.
    """
    began = time.monotonic()
    job = prepare(base, adapter, dtype, strength, device)
    files = shards((output.entry for output in job.outputs), shard_size)
    partial = Partial(Path(out), sync=verify)
    adapter_hashes = job.check_adapter(hashes=verify)
    recipe = job.recipe(shard_size, verify, adapter_hashes)
    buffers = job.buffers(max_memory)
    _check_disk(partial, sum(shard.nbytes for shard in files))
    partial.open(recipe, resume)
    total = sum(shard.nbytes for shard in files)
    written = 0
    input_hashes: dict[str, str] = {}
    output_hashes: dict[str, str] = {}
    with one_thread():
        for shard in files:
            line = partial.finished.get(shard.file)
            if line is None or hash_tensors(partial.path / shard.file, shard) != line["outputs"]:
                line = job.write_shard(partial, shard, buffers, verify, lambda n: progress(written + n, total))  # noqa: B023
            input_hashes |= line["inputs"]
            output_hashes |= line["outputs"]
            written += shard.nbytes
            progress(written, total)
    beside = companions(job.base, job.layout, job.landing, dtype) | index_file(files)
    for name, content in beside.items():
        partial.write(name, content)
    hashed_files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(beside.items())}
    receipt = {
        "schema_version": 1,
        "d2surgery": version("d2surgery"),
        "torch": torch.__version__,
        "recipe": {k: v for k, v in recipe.items() if k not in ("files", "adapter")},
        "base": {"tensors": dict(sorted(input_hashes.items()))},
        "adapter": {"tensors": adapter_hashes, "base_model": _hub_id(job.layout.base_model)},
        "outputs": {"tensors": dict(sorted(output_hashes.items())), "files": hashed_files},
        "untied": job.landing.untied,
        "problems": [asdict(problem) for problem in job.problems],
    }
    partial.write(RECEIPT, json.dumps(receipt, indent=1).encode())
    partial.publish()
    return MergeReport(
        out=str(out),
        tensors_written=len(job.outputs),
        bytes_written=total,
        modules_merged=len(job.layout.adapters),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
        receipt=str(Path(out) / RECEIPT),
        problems=job.problems,
    )


def plan(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    dtypes: tuple[str, ...] = ("BF16", "F16"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PlanReport:
    """What `merge` with the same arguments would do, and how much of each module's delta would survive in `dtypes`.

    Reads the adapted tensors once or twice, writes nothing. Raises what merge raises before it writes.
    """
    job = prepare(base, adapter, dtype, strength, device)
    job.check_adapter(hashes=False)
    files = shards((output.entry for output in job.outputs), shard_size)
    buffers = job.buffers(max_memory)
    with one_thread():
        found = job.survival(buffers, dtypes, progress)
    tile_bytes = job.merger.grid * 8 * 4
    return PlanReport(
        out=str(out),
        tensors=len(job.outputs),
        bytes=sum(shard.nbytes for shard in files),
        disk_free_bytes=shutil.disk_usage(_existing(Path(out))).free,
        peak_memory_bytes=max(peak_memory(), _resident_memory() + tile_bytes),
        shards=len(files),
        modules=len(job.layout.adapters),
        untied=job.landing.untied,
        survival=found,
        problems=job.problems,
    )


def prepare(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dtype: str | None,
    strength: float,
    device: str,
) -> "Job":
    checkpoint = load(adapter)
    weights = BaseWeights(base)
    landing = sites(checkpoint.layout, weights.header, weights.config)
    problems = [*checkpoint.layout.problems, *landing.problems]
    if strength != 1 and (checkpoint.layout.replacements or checkpoint.layout.rows):
        names = ", ".join([*checkpoint.layout.replacements, *checkpoint.layout.rows][:3])
        problems.append(
            Problem(code="STRENGTH", message="replaced weights", wanted="1", got=f"{strength}", module=names)
        )
    problems += _unconsumed(checkpoint.layout, landing)
    raise_errors(problems)
    if strength == 0:  # the base, bit for bit
        landing = replace(landing, sites={}, untied=False)
    return Job(checkpoint, weights, landing, tuple(problems), dtype, strength, find_device(device))


def _unconsumed(layout: Layout, landing: Landing) -> Iterator[Problem]:
    """Conservation: what no site uses and no problem names would be lost silently. Here it is named."""
    modules = {patch.module for site in landing.sites.values() for patch in site.patches}
    used = {key for module in modules for slot, key in layout.adapters[module].slots.items() if slot != "bias"}
    used |= {layout.adapters[site.bias].slots["bias"] for site in landing.sites.values() if site.bias}
    used |= {site.replacement for site in landing.sites.values() if site.replacement}
    used |= {site.rows.key for site in landing.sites.values() if site.rows}
    used |= {key for _, key in landing.twins}
    if not any(problem.severity == "error" for problem in (*layout.problems, *landing.problems)):
        for key in sorted(layout.header.tensors.keys() - used):
            yield Problem(code="UNKNOWN_TENSOR", message="no place in the base takes it", module=key)


@dataclass
class Job:
    """One merge: what to do, and the tensors at hand while it is done."""

    checkpoint: Checkpoint
    base: BaseWeights
    landing: Landing
    problems: tuple[Problem, ...]
    dtype: str | None
    strength: float
    device: torch.device

    def __post_init__(self) -> None:
        self.layout: Layout = self.checkpoint.layout
        self.merger = TileMerger(self.checkpoint, self.strength, self.device)
        self.outputs = self._outputs()

    def _outputs(self) -> list[Output]:
        base = self.base.header.tensors
        floats = Counter(info.dtype for info in base.values() if info.dtype in FLOATS)
        usual = floats.most_common(1)[0][0] if floats else "F32"
        order = sorted(base, key=lambda name: (base[name].file, base[name].start))
        outputs = []
        for name in [*order, *(name for name in self.landing.sites if name not in base)]:
            site = self.landing.sites.get(name)
            info = self._source(name, site)
            stored = base[site.source].dtype if site and site.source else info.dtype if site is None else usual
            if info.dtype not in FLOATS:  # a counter that a saved module brings along
                stored = info.dtype
            dtype = self.dtype if self.dtype and stored in FLOATS else stored
            outputs.append(Output(name, info, dtype, site))
        return outputs

    def _source(self, name: str, site: Site | None) -> TensorInfo:
        if site is not None and site.replacement:
            return self.layout.header.tensors[site.replacement]
        return self.base.header.tensors[site.source if site and site.source else name]

    # Before writing ----------------------------------------------------------------------------------------------

    def check_adapter(self, *, hashes: bool) -> dict[str, str]:
        """Read every adapter tensor once: all finite, tied twins equal. Returns their sha256."""
        problems: list[Problem] = []
        digests: dict[str, str] = {}
        for key in sorted(self.layout.header.tensors):
            tensor = self.checkpoint.tensor(key)
            if hashes:
                digests[key] = hashlib.sha256(as_bytes(tensor)).hexdigest()
            if not all_finite(tensor):
                problems.append(Problem(code="NOT_FINITE", message="NaN or infinity", module=key))
        for first, second in self.landing.twins:
            a, b = self.checkpoint.tensor(first), self.checkpoint.tensor(second)
            if not (torch.equal(a, b) or torch.equal(a.T, b)):
                problems.append(Problem(code="TIE_BROKEN_BY_FILE", message=f"differs from {first}", module=second))
        raise_errors(problems)
        return digests

    def recipe(self, shard_size: int, verify: bool, adapter_hashes: Mapping[str, str]) -> dict[str, Any]:
        """All that decides the bytes written. The files' times stand in the journal, not in the receipt."""
        stats = [(file, file.stat()) for file in self.base.header.files]
        return {
            "files": [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
            "adapter": hashlib.sha256(json.dumps([adapter_hashes, dict(self.layout.config)]).encode()).hexdigest(),
            "versions": [version("d2surgery"), torch.__version__],
            "dtype": self.dtype,
            "strength": self.strength,
            "shard_size": shard_size,
            "tile": self.merger.grid,
            "device": self.device.type,
            "verify": verify,
        }

    def buffers(self, max_memory: int | None) -> list[Tensor]:
        """Read buffers, as many as the memory allows, between 2 and 4."""
        largest = max((tile.nbytes for output in self.outputs for tile in tiles(output, False)), default=0)
        count = _BUFFERS
        if max_memory is not None:
            work = 4 * largest * (2 if any(o.info.dtype in ("F32", "F64") for o in self.outputs) else 4)
            need = _resident_memory() + work
            count = min(_BUFFERS, (max_memory - need) // max(2 * largest, 1))
            if count < 2:
                want = f"at least {-(-(need + 4 * largest) // 1_000_000)} MB"
                raise refuse("MEMORY", "too little for two tiles", wanted=want, got=f"{max_memory // 1_000_000} MB")
        return [torch.empty(largest, dtype=torch.uint8) for _ in range(count)]

    # Writing -----------------------------------------------------------------------------------------------------

    def write_shard(
        self, partial: Partial, shard: Shard, buffers: list[Tensor], verify: bool, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Fill one shard and put its line in the journal."""
        names = {entry.name for entry in shard.entries}
        ordered = {output.name: output for output in self.outputs if output.name in names}
        inputs: dict[str, Any] = {}
        writer = ShardWriter(partial.path / shard.file, shard, hashes=verify, sync=verify)
        done = 0

        def read(tile: Tile, buffer: Tensor) -> None:
            self.merger.read(tile, buffer)
            if verify and not tile.measure and not tile.output.copied and self._from_base(tile.output):
                digest = inputs.setdefault(tile.output.name, hashlib.sha256())
                digest.update(as_bytes(buffer[: tile.nbytes]))

        def write(tile: Tile, piece: Tensor) -> None:
            nonlocal done
            writer.write(tile.output.name, piece)
            done += piece.nbytes
            progress(done)

        queue = (tile for entry in shard.entries for tile in self.merger.tiles(ordered[entry.name]))
        try:
            pipeline(queue, read, self.merger.merge, write, buffers)
        except BaseException:
            writer.abandon()
            raise
        outputs = writer.close()
        hashed = {name: digest.hexdigest() for name, digest in inputs.items()}
        copied = {name: outputs[name] for name, output in ordered.items() if output.copied and name in outputs}
        line = {"file": shard.file, "inputs": hashed | copied, "outputs": outputs}
        partial.append(json.dumps(line))
        return line

    def _from_base(self, output: Output) -> bool:
        return output.site is None or (output.site.replacement is None and output.site.source == output.name)

    # Forecast ----------------------------------------------------------------------------------------------------

    def survival(
        self, buffers: list[Tensor], dtypes: tuple[str, ...], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Survival]]:
        """Per module and output dtype, from the deltas themselves."""
        found: dict[str, dict[str, Survival]] = {}
        adapted = [output for output in self.outputs if output.site and output.site.patches]
        total = sum(output.entry.nbytes for output in adapted)
        done = 0

        def compute(tile: Tile, buffer: Tensor) -> None:
            nonlocal done
            base_weight, delta = self.merger.delta(tile, buffer)
            if tile.patch is not None and delta is not None:
                sums = found.setdefault(tile.patch.module, dict.fromkeys(dtypes, Survival()))
                for dtype in dtypes:
                    sums[dtype] += survival(base_weight, delta, DTYPES[dtype])
                done += tile.nbytes
                progress(done, total)

        queue = (tile for output in adapted for tile in self.merger.tiles(output))
        pipeline(queue, self.merger.read, compute, lambda tile, piece: None, buffers)
        return found


def _check_disk(partial: Partial, need: int) -> None:
    done = sum(path.stat().st_size for path in partial.path.iterdir()) if partial.path.exists() else 0
    free = shutil.disk_usage(_existing(partial.out)).free
    if need - done > free:
        raise refuse("DISK_FULL", "not begun", file=str(partial.out), wanted=f"{need - done} bytes", got=f"{free}")


def _hub_id(base_model: str | None) -> str | None:
    """The receipt holds no paths, which differ from one machine to the next."""
    return None if base_model is None or Path(base_model).is_absolute() else base_model


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_memory() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory()


class one_thread:
    """One intra-op thread while reading and writing have threads of their own: more would fight over the cores."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
