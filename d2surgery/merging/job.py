"""One merge at work: outputs in order, tiles through the pipeline, shards, the receipt."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2surgery.checkpoint import Checkpoint, opened
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import FLOATS, TensorInfo
from d2surgery.files.tensors import DTYPES, as_bytes, find_device
from d2surgery.files.writer import (
    Partial,
    Shard,
    ShardWriter,
    free_space,
    hash_tensors,
    index_file,
    shards,
)
from d2surgery.formats.layout import Layout
from d2surgery.machine import one_thread, resident_memory, workers
from d2surgery.measures.fidelity import Survival, survival
from d2surgery.merging.companions import companions
from d2surgery.merging.receipt import RECEIPT, receipt_of, recipe_of
from d2surgery.merging.tiles import Output, Steps, TileMerger, all_finite, tiles
from d2surgery.placement.fit import Fit, fit
from d2surgery.placement.sites import Landing, Site


def prepare(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dtype: str | None,
    strength: float,
    device: str,
) -> "Job":
    """The job of an adapter that fits its base. Raises D2SurgeryError with every misfit at once."""
    return Job.of(fit(base, adapter, strength), dtype, device)


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

    @classmethod
    def of(cls, fitted: Fit, dtype: str | None, device: str) -> "Job":
        """`dtype`: of every floating-point output, None to keep the base's."""
        checkpoint = opened(fitted.layout)
        return cls(
            checkpoint, fitted.base, fitted.landing, fitted.problems, dtype, fitted.strength, find_device(device)
        )

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
        """All that decides the bytes written."""
        return recipe_of(
            self.layout,
            adapter_hashes,
            self.device,
            files=self.base.opened,
            dtype=self.dtype,
            strength=self.strength,
            shard_size=shard_size,
            tile=self.merger.grid,
            verify=verify,
        )

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
        largest = max((tile.nbytes for output in self.outputs for tile in tiles(output)), default=0)
        widened = 2 if any(output.info.dtype in ("F32", "F64") for output in self.outputs) else 4
        patches = (patch for output in self.outputs if output.site for patch in output.site.patches)
        count = 6 if any(map(self.merger.crosses_tiles, patches)) else 4
        sizes = [(a.out_features + a.in_features) * sum(a.ranks.values()) for a in self.layout.adapters.values()]
        adapters = 3 * 24 * max(sizes, default=0)  # as stored, in float64, in the work's dtype
        return (1 + count * widened) * largest + adapters

    # Writing -----------------------------------------------------------------------------------------------------

    def write(
        self,
        out: Path,
        hashed_ahead: Callable[[], Mapping[str, str]],
        *,
        max_memory: int | None,
        shard_size: int,
        resume: bool,
        verify: bool,
        progress: Callable[[int, int], None],
    ) -> int:
        """Write and publish the merged checkpoint at `out`; returns the bytes of its weights.

        hashed_ahead() gives the sha256 of those tensors of the base for which they are known when tiles begin.
        """
        files = shards((output.entry for output in self.outputs), shard_size)
        total = sum(shard.nbytes for shard in files)
        partial = Partial(out, sync=verify)
        with one_thread():
            adapter_hashes = self.check_adapter(hashes=verify)
            recipe = self.recipe(shard_size, verify, adapter_hashes)
            threads = self.threads(max_memory)
            _check_disk(partial, total)
            partial.open(recipe, resume)
            known = hashed_ahead()
            written = 0
            inputs: dict[str, str] = {}
            outputs: dict[str, str] = {}

            def advance(done: int) -> None:
                progress(written + done, total)

            for shard in files:
                line = partial.finished.get(shard.file)
                if line is None or hash_tensors(partial.path / shard.file, shard) != line["outputs"]:
                    line = self.write_shard(partial, shard, threads, known, verify, advance)
                inputs |= line["inputs"]
                outputs |= line["outputs"]
                written += shard.nbytes
                progress(written, total)
        self.base.refuse_changes()
        beside = companions(self.base, self.layout, self.landing, self.dtype) | index_file(files)
        for name, content in beside.items():
            partial.write(name, content)
        receipt = receipt_of(
            self.layout, recipe, adapter_hashes, inputs, outputs, beside, untied=self.landing.untied,
            problems=self.problems,
        )  # fmt: skip
        partial.write(RECEIPT, json.dumps(receipt, indent=1).encode())
        partial.publish()
        return total

    def write_shard(
        self,
        partial: Partial,
        shard: Shard,
        threads: int,
        known: Mapping[str, str],
        verify: bool,
        progress: Callable[[int], None],
    ) -> dict[str, Any]:
        """Fill one shard and put its line in the journal. `known` are sha256 of tensors of the base."""
        outputs = {output.name: output for output in self.outputs}
        ordered = [outputs[entry.name] for entry in shard.entries]
        computed = {output.name for output in ordered if verify and self._computed(output)}
        unknown = computed - known.keys()
        writer = ShardWriter(partial.path / shard.file, shard, hashes=verify, sync=verify)

        def write_tensor(steps: Steps) -> str:
            """The sha256 of what it is computed from, unless that is known."""
            digest = hashlib.sha256()
            for tile, stored in steps:
                if tile.output.name in unknown:
                    digest.update(as_bytes(stored))
                writer.write(tile.output.name, self.merger.merge(tile, stored))
            return digest.hexdigest()

        try:
            work = [(output, write_tensor) for output in ordered]
            digests = list(self.merger.over(work, threads, progress))
        except BaseException:
            writer.abandon()
            raise
        written = writer.close()
        read = {output.name: digest for output, digest in zip(ordered, digests, strict=True)}
        inputs = {name: known.get(name, read[name]) for name in computed}
        inputs |= {output.name: written[output.name] for output in ordered if verify and output.copied}
        line = {"file": shard.file, "inputs": inputs, "outputs": written}
        partial.append(json.dumps(line))
        return line

    def _computed(self, output: Output) -> bool:
        """Whether it is made of the base's tensor of the same name, and not copied."""
        if output.site is None:
            return not output.copied
        return output.site.replacement is None and output.site.source == output.name

    # Forecast ----------------------------------------------------------------------------------------------------

    def survival(
        self, threads: int, dtypes: tuple[str, ...], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Survival]]:
        """Per module and output dtype, from the deltas themselves."""
        adapted = [output for output in self.outputs if output.site and output.site.patches]
        total = sum(output.entry.nbytes for output in adapted)

        def measure(steps: Steps) -> dict[tuple[str, str], Survival]:
            sums: defaultdict[tuple[str, str], Survival] = defaultdict(Survival)
            for tile, stored in steps:
                if tile.patch is not None:
                    base_weight, delta = self.merger.delta(tile, stored)
                    for dtype in dtypes:
                        sums[tile.patch.module, dtype] += survival(base_weight, delta, DTYPES[dtype])
            return sums

        found: dict[str, dict[str, Survival]] = {}
        for sums in self.merger.over([(o, measure) for o in adapted], threads, lambda done: progress(done, total)):
            for (module, dtype), part in sums.items():
                of_module = found.setdefault(module, dict.fromkeys(dtypes, Survival()))
                of_module[dtype] += part
        return found


def _check_disk(partial: Partial, need: int) -> None:
    done = sum(path.stat().st_size for path in partial.path.iterdir()) if partial.path.exists() else 0
    free = free_space(partial.out)
    if need - done > free:
        raise refuse("DISK_FULL", "not begun", file=str(partial.out), wanted=f"{need - done} bytes", got=f"{free}")
