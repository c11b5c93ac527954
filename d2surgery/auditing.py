"""Is a merged checkpoint the base with the adapter? Every tensor accounted for, every difference explained.

First the merge is replayed: our own way, then by the bank of recipes. What no recipe gives bit for bit is measured:
its strength λ̂ with a standard error, and whether what is left is rounding. What is wrong gets a name.
One pass over base and merged side by side, by row tiles, as `merge` reads them.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isnan, prod
from pathlib import Path

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.base import BaseWeights
from d2surgery.errors import Problem, Severity, refuse
from d2surgery.findings import Audit, ModuleAudit, Status, TensorAudit, Thresholds, verdict_of
from d2surgery.header import BITS, FLOATS, TensorInfo
from d2surgery.measures.fidelity import LOW_GAIN, ULPS, Comparison, Survival, bits, compare, measured
from d2surgery.merging import Job, one_thread, peak_memory, prepare
from d2surgery.recipes import OURS, RECIPES, Operands, Recipe
from d2surgery.sites import Patch
from d2surgery.tensors import DTYPES, as_bytes, read_into
from d2surgery.ties import find_tie
from d2surgery.tiles import Output, Tile, all_finite
from d2surgery.writer import pipeline

WHOLE = 1 << 24  # entries of a weight that is held whole, where a recipe needs whole vectors
_SAMPLE_ROWS = 64
_BUFFERS = 3


def audit(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    levels: tuple[str, ...] = ("weights",),
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Compare every tensor of `merged` with `base` + `adapter`; progress(done, total) in bytes of the merged file.

    Raises D2SurgeryError for what cannot be audited at all: unreadable inputs, an adapter that does not fit the base.
    """
    began = time.monotonic()
    job = prepare(base, adapter, None, 1.0, "cpu")
    job.check_adapter(hashes=False)
    found = _open_merged(merged)
    pairs, absent, extra = _pairs(job, found)
    look = _Look(job, pairs)
    with one_thread():
        look.run(progress)
    modules = {name: _judge_module(job, name, tally, thresholds) for name, tally in look.modules.items()}
    tensors = {pair.name: look.tensor(pair, modules) for pair in pairs} | absent | extra
    reasons = (*_module_reasons(modules), *_tensor_reasons(tensors))
    return Audit(
        verdict=verdict_of(reasons),
        reasons=reasons,
        base=str(base),
        adapter=str(adapter),
        merged=str(merged),
        levels=levels,
        thresholds=thresholds,
        recipe=_commonest(modules),
        modules=modules,
        tensors=tensors,
        not_checked=(),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
    )


def _open_merged(directory: str | os.PathLike[str]) -> BaseWeights:
    path = Path(directory)
    if (path / "adapter_config.json").exists() and not list(path.glob("model*.safetensors")):
        raise refuse("BAD_MERGED", "this is an adapter, not a merged checkpoint", file=str(path))
    return BaseWeights(path)


# Which tensor is compared with which -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A tensor of the merged file, and the output that it should be."""

    name: str
    output: Output
    info: TensorInfo
    status: Status  # when it is right


def _pairs(job: Job, merged: BaseWeights) -> tuple[list[_Pair], dict[str, TensorAudit], dict[str, TensorAudit]]:
    """What is compared, what is missing or resized, and what is extra."""
    there = dict(merged.header.tensors)
    expected = {output.name: output for output in job.outputs}
    ties = find_tie(merged.header, merged.config)
    names = _match(expected, there)
    pairs, absent = [], {}
    for name, output in expected.items():
        found = names.get(name)
        status = _status(output)
        if found is None and name in ties.aliases:
            found, status = ties.aliases[name], "tied"
        if found is None:
            absent[name] = _lacking(output, name, "missing", "TENSOR_MISSING")
        elif there[found].shape != output.shape:
            absent[found] = _lacking(output, found, "resized", "TENSOR_RESIZED", there[found])
        elif (there[found].dtype in FLOATS) != (output.dtype in FLOATS):
            absent[found] = _lacking(output, found, "changed", "REQUANTIZED", there[found])
        else:
            shown = name if status == "tied" else found
            pairs.append(_Pair(shown, output._replace(dtype=there[found].dtype), there[found], status))
    spare = there.keys() - set(names.values())
    base_ties = find_tie(job.base.header, job.base.config)
    extra = {}
    for name in sorted(spare):
        source = expected.get(base_ties.aliases.get(name, ""))
        if source is not None and source.shape == there[name].shape:
            pairs.append(_Pair(name, source._replace(dtype=there[name].dtype), there[name], "tied"))
        else:
            info = there[name]
            extra[name] = TensorAudit(
                name=name, status="extra", dtype=info.dtype, shape=info.shape, elements=prod(info.shape),
                code="TENSOR_EXTRA",
            )  # fmt: skip
    return pairs, absent, extra


def _match(expected: Mapping[str, Output], there: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Expected name -> name in the file: the same, else the one way to add or remove a prefix that fits most."""
    names = {name: name for name in expected if name in there}
    left = [name for name in expected if name not in names]
    spare = there.keys() - names.keys()
    ways = Counter(
        (name.removesuffix(other), "") if name.endswith(f".{other}") else ("", other.removesuffix(name))
        for name in left
        for other in spare
        if name.endswith(f".{other}") or other.endswith(f".{name}")
    )
    for (old, new), _ in ways.most_common():
        for name in left:
            other = new + name.removeprefix(old)
            if name not in names and name.startswith(old) and other in spare:
                names[name] = other
                spare = spare - {other}
    return names


def _status(output: Output) -> Status:
    site = output.site
    if site is None or not (site.patches or site.replacement or site.rows or site.bias):
        return "unchanged"
    return "adapted" if site.patches or site.bias else "replaced"


def _lacking(output: Output, name: str, status: Status, code: str, info: TensorInfo | None = None) -> TensorAudit:
    shape = info.shape if info else output.shape
    return TensorAudit(
        name=name, status=status, dtype=info.dtype if info else output.dtype, shape=shape, elements=prod(shape),
        modules=_modules(output), code=code,
    )  # fmt: skip


def _modules(output: Output) -> tuple[str, ...]:
    site = output.site
    return tuple(dict.fromkeys(p.module for p in site.patches)) + ((site.bias,) if site.bias else ()) if site else ()


# The pass over both ----------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums of one module so far."""

    survival: Survival = field(default_factory=Survival)
    comparison: Comparison = field(default_factory=Comparison)
    recipes: Counter[str] = field(default_factory=Counter)  # recipe -> tiles that it replays, or comes nearest to
    first: tuple[str, int] | None = None  # tensor and element of the first mismatch
    finite: bool = True
    unknown: bool = False  # the bank was tried and nothing replays


@dataclass
class _Look:
    """One pass over the pairs, and what it has found."""

    job: Job
    pairs: list[_Pair]
    modules: defaultdict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))
    mismatched: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # pair -> element
    favourite: Recipe = RECIPES[0]

    def run(self, progress: Callable[[int, int], None]) -> None:
        total = sum(pair.info.nbytes for pair in self.pairs)
        done = 0

        def compute(step: tuple[_Pair, Tile], buffer: Tensor) -> None:
            nonlocal done
            pair, tile = step
            self._compare(pair, tile, buffer)
            if not tile.measure:
                done += _share(pair, tile)[1]
                progress(done, total)

        queue = [(pair, tile) for pair in self.pairs for tile in self.job.merger.tiles(pair.output)]
        largest = max((tile.nbytes + _share(pair, tile)[1] for pair, tile in queue), default=0)
        buffers = [torch.empty(largest + 64, dtype=torch.uint8) for _ in range(_BUFFERS)]
        pipeline(queue, self._read, compute, lambda step, piece: None, buffers)

    def tensor(self, pair: _Pair, modules: Mapping[str, ModuleAudit]) -> TensorAudit:
        bad = self.mismatched[pair.name]
        adapted = _modules(pair.output) if pair.status != "tied" else ()
        wrong = [module for module in adapted if module in modules and modules[module].verdict == "fail"]
        status, code = pair.status, ""
        if wrong or (bad and not adapted):
            status, code = "changed", modules[wrong[0]].code if wrong else "TENSOR_CHANGED"
        shape = pair.output.shape
        return TensorAudit(
            name=pair.name, status=status, dtype=pair.info.dtype, shape=shape, elements=prod(shape),
            mismatched_elements=bad, modules=adapted, code=code,
            first_mismatch=_index(self.first[pair.name], shape) if bad else None,
        )  # fmt: skip

    def _read(self, step: tuple[_Pair, Tile], buffer: Tensor) -> None:
        pair, tile = step
        self.job.merger.read(tile, buffer)
        if not tile.measure:
            start, nbytes = _share(pair, tile)
            at = _aligned(tile.nbytes)
            fd = os.open(pair.info.file, os.O_RDONLY)
            try:
                read_into(fd, as_bytes(buffer[at : at + nbytes]), pair.info.start + start)
            finally:
                os.close(fd)

    def _compare(self, pair: _Pair, tile: Tile, buffer: Tensor) -> None:
        merger = self.job.merger
        if tile.measure:
            merger.merge(tile, buffer)
            return
        _, nbytes = _share(pair, tile)
        at = _aligned(tile.nbytes)
        merged = buffer[at : at + nbytes].view(DTYPES[pair.info.dtype])
        if tile.patch is None:
            wanted = merger.merge(tile, buffer)
            assert wanted is not None
            self._note(pair, tile, wanted.reshape(-1).view(merged.dtype), merged)
            return
        base_weight, delta = merger.delta(tile, buffer)
        assert delta is not None
        base_weight = base_weight.clone()  # the merger's workspace
        effective = merger.effective(tile, base_weight.clone())
        assert effective is not None
        wanted = merger.finish(tile, effective, torch.empty(tile.nbytes, dtype=torch.uint8))
        self._compare_adapted(pair, tile, base_weight, delta, wanted.reshape(-1), merged)

    def _compare_adapted(
        self, pair: _Pair, tile: Tile, base_weight: Tensor, delta: Tensor, ours: Tensor, merged: Tensor
    ) -> None:
        patch = tile.patch
        assert patch is not None
        tally = self.modules[patch.module]
        recipe, wanted = self._best(pair, tile, base_weight, ours, merged)
        tally.recipes[recipe.name] += 1
        base, change = (base_weight.T, delta.T) if patch.transposed else (base_weight, delta)
        made, wanted_ = merged.view(base.shape), wanted.view(base.shape)
        tally.survival += measured(base, change, made.to(base.dtype))
        tally.comparison += compare(base, change, wanted_, made)
        if not all_finite(merged):
            tally.finite = False
        if self._note(pair, tile, wanted, merged) and tally.first is None:
            tally.first = (pair.name, self.first[pair.name])

    def _best(
        self, pair: _Pair, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor
    ) -> tuple[Recipe, Tensor]:
        """The recipe that replays this tile, the favourite first; ours where none does."""
        patch = tile.patch
        assert patch is not None
        tally = self.modules[patch.module]
        if self.favourite.name == OURS and torch.equal(bits(ours), bits(merged)):
            return self.favourite, ours
        if tally.unknown or (pair.output.site is not None and pair.output.site.bias == patch.module):
            return RECIPES[0], ours
        for recipe in self._bank(patch):
            wanted = self._replay(recipe, pair, tile, base_weight, ours, merged)
            if wanted is not None:
                self.favourite = recipe
                return recipe, wanted
        tally.unknown = True
        return RECIPES[0], ours

    def _bank(self, patch: Patch) -> Iterator[Recipe]:
        kind = self.job.layout.adapters[patch.module].kind
        yield self.favourite
        yield from (recipe for recipe in RECIPES if kind in recipe.kinds and recipe is not self.favourite)

    def _replay(
        self, recipe: Recipe, pair: _Pair, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor
    ) -> Tensor | None:
        """What the recipe makes of the tile, if it is the file's bits; a few rows decide for most recipes."""
        patch = tile.patch
        assert patch is not None
        if recipe.name == OURS:
            return ours if torch.equal(bits(ours), bits(merged)) else None
        adapter = self._adapter(patch)
        if recipe.kinds and self.job.merger.crosses_tiles(patch):
            return None
        rows = tile.last - tile.first
        for count in dict.fromkeys((min(_SAMPLE_ROWS, rows), rows)):
            part = slice(tile.first - patch.start, tile.first - patch.start + count)
            taken = adapter.take(in_=part) if patch.transposed else adapter.take(out=part)
            base = base_weight[:, :count] if patch.transposed else base_weight[:count]
            made = recipe.merge(Operands(base.to(DTYPES[pair.output.info.dtype]), taken, merged.dtype))
            made = (made.T if patch.transposed else made).reshape(-1)
            if not torch.equal(bits(made), bits(merged[: made.numel()])):
                return None
        return made

    def _adapter(self, patch: Patch) -> Adapter:
        assert self.job.merger.current is not None
        return self.job.merger.current[1]

    def _note(self, pair: _Pair, tile: Tile, wanted: Tensor, merged: Tensor) -> int:
        """Count mismatched elements; remember the first."""
        if torch.equal(_words(wanted), _words(merged)):
            return 0
        different = bits(wanted) != bits(merged)
        count = int(torch.count_nonzero(different))
        if count and pair.name not in self.first:
            at = int(different.to(torch.uint8).argmax())
            self.first[pair.name] = tile.start * 8 // BITS[pair.output.info.dtype] + at
        self.mismatched[pair.name] += count
        return count


def _share(pair: _Pair, tile: Tile) -> tuple[int, int]:
    """Where the tile's elements are in the merged tensor: first byte and number of bytes."""
    source, own = BITS[pair.output.info.dtype], BITS[pair.info.dtype]
    return tile.start * own // source, tile.nbytes * own // source


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _words(values: Tensor) -> Tensor:
    """The same bytes as few large integers: compared faster."""
    whole = values.reshape(-1).view(torch.uint8)
    return whole.view(torch.int64) if whole.numel() % 8 == 0 and whole.storage_offset() % 8 == 0 else whole


def _index(element: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major position of the element."""
    index: list[int] = []
    for size in reversed(shape):
        element, at = divmod(element, size)
        index.append(at)
    return tuple(reversed(index))


# Judgement -------------------------------------------------------------------------------------------------------


def _judge_module(job: Job, module: str, tally: _Tally, thresholds: Thresholds) -> ModuleAudit:
    sums = tally.comparison
    status, verdict, code, message = "replayed", "pass", "", ""
    if not tally.finite:
        status, verdict, code, message = "wrong", "fail", "NOT_FINITE", "the merged weight holds NaN or infinity"
    elif sums.mismatched:
        status, verdict, code, message = _strength_verdict(sums, tally.survival, thresholds)
    names = tuple(name for name, site in job.landing.sites.items() if any(p.module == module for p in site.patches))
    labels = [f"{low + 1}-{high}" if high > low + 1 else f"{high}" for low, high in zip((0, *ULPS), ULPS, strict=False)]
    return ModuleAudit(
        module=module,
        kind=job.layout.adapters[module].kind,
        status=status,  # type: ignore[arg-type]
        verdict=verdict,  # type: ignore[arg-type]
        tensors=names,
        elements=sums.elements,
        mismatched_elements=sums.mismatched,
        recipe=tally.recipes.most_common(1)[0][0],
        strength=sums.strength,
        strength_error=sums.strength_error,
        residual=sums.residual,
        survival=tally.survival,
        ulps=dict(zip([*labels, f">{ULPS[-1]}"], sums.ulps, strict=True)) if sums.mismatched else {},
        first_mismatch=None,
        code=code,
        message=message,
    )


def _strength_verdict(sums: Comparison, survival: Survival, limits: Thresholds) -> tuple[str, str, str, str]:
    off, error = abs(sums.strength - 1), sums.strength_error
    said = f"strength {sums.strength:.4f} ± {error:.1g}"
    if isnan(off):
        return "uncertain", "inconclusive", "STRENGTH_UNCERTAIN", "rounding left nothing of the delta to measure"
    if survival.changed == 0:
        return "wrong", "fail", "DELTA_NOT_APPLIED", "the base, unchanged"
    if off <= limits.strength_pass:
        return "rounding", "pass", "OTHER_ROUNDING", said
    if off > limits.strength_fail and off > 5 * error:
        usual = {-1: "SIGN_FLIPPED", 2: "DELTA_APPLIED_TWICE"}
        code = usual.get(round(sums.strength), "WRONG_STRENGTH")
        return "wrong", "fail", code if abs(sums.strength - round(sums.strength)) < 0.01 else "WRONG_STRENGTH", said
    return "uncertain", "inconclusive", "STRENGTH_UNCERTAIN", said


def _commonest(modules: Mapping[str, ModuleAudit]) -> str | None:
    replayed = Counter[str]()
    for module in modules.values():
        if module.status == "replayed" and module.recipe:
            replayed[module.recipe] += module.elements
    return replayed.most_common(1)[0][0] if replayed else None


_SEVERITY: dict[str, Severity] = {"OTHER_ROUNDING": "info", "STRENGTH_UNCERTAIN": "warning", "LOW_SURVIVAL": "warning"}


def _module_reasons(modules: Mapping[str, ModuleAudit]) -> Iterator[Problem]:
    """One problem per code, naming the first modules."""
    by_code: dict[str, list[ModuleAudit]] = {}
    for module in modules.values():
        if module.code:
            by_code.setdefault(module.code, []).append(module)
        if module.survival.gain < LOW_GAIN and module.verdict == "pass":
            by_code.setdefault("LOW_SURVIVAL", []).append(module)
    for code, group in by_code.items():
        text = group[0].message
        if code == "LOW_SURVIVAL":
            text = f"rounding left {min(m.survival.gain for m in group):.2f} of the delta at least"
        names = _several([m.module for m in group])
        yield Problem(code=code, severity=_SEVERITY.get(code, "error"), message=text, module=names)
    missed = by_code.get("DELTA_NOT_APPLIED", ())
    if missed and len(missed) < len(modules):
        yield Problem(code="PARTIAL_MERGE", message=f"{len(missed)} of {len(modules)} modules are as in the base")


def _tensor_reasons(tensors: Mapping[str, TensorAudit]) -> Iterator[Problem]:
    by_code: dict[str, list[TensorAudit]] = {}
    for tensor in tensors.values():
        if tensor.code and not tensor.modules:
            by_code.setdefault(tensor.code, []).append(tensor)
    for code, group in by_code.items():
        yield Problem(code=code, message=group[0].status, module=_several([t.name for t in group]))


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
