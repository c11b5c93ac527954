"""The evidence of an audit: every module and every tensor of the merged checkpoint, compared and judged."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from d2surgery.auditing.blocks import diagnosis_of
from d2surgery.auditing.casts import cast_before
from d2surgery.auditing.diagnosis import Diagnosis
from d2surgery.auditing.findings import ModuleAudit, TensorAudit, Thresholds
from d2surgery.auditing.judgement import (
    FEW,
    isolated,
    judge_module,
    judge_tensor,
    pooled,
    shared_twice,
    wrong_base,
)
from d2surgery.auditing.likeness import another_adapter
from d2surgery.auditing.marking import with_structure
from d2surgery.auditing.pairing import Pairing, TensorPair, pair_up
from d2surgery.auditing.replay import ALIKE, Replay
from d2surgery.auditing.tally import Tally
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import DTYPES, read_tensor
from d2surgery.machine import ahead, one_thread, trim, workers
from d2surgery.merging.prepared import Prepared

if TYPE_CHECKING:
    from d2surgery.auditing.grid_rules import Judged


def compared(
    prepared: Prepared, merged: BaseWeights, thresholds: Thresholds, progress: Callable[[int, int], None]
) -> tuple[Pairing, dict[str, ModuleAudit], dict[str, TensorAudit], tuple[str, ...]]:
    """What stands for what, every module and every tensor with its evidence, and the recipes that fit, too."""
    pairing, dtype = pair_up(prepared, merged), merged.header.usual_dtype or ""
    pairs = tuple(pair for pair in pairing.pairs if not pair.info.grid)
    replay = Replay(prepared.merger)
    with one_thread():
        replay.run(pairs, progress)
        _settle_recipes(replay, pairs)
        modules = with_structure(prepared, replay, pairs, dict(_judged(prepared, replay, pairs, thresholds)))
        different = [pair for pair in pairs if replay.tensors[pair.name].mismatched]
        forgotten = {pair.name: _is_base(prepared.fit.base, pair) for pair in different}
    modules = isolated(pooled(modules, replay.modules, thresholds, dtype), replay.modules)
    modules = another_adapter(wrong_base(modules, pairs, replay), pairs, replay)
    modules = shared_twice(modules, pairing.shared)
    cast = cast_before(replay, pairs, modules)
    tensors = {pair.name: judge_tensor(pair, replay, modules, forgotten, cast) for pair in pairs}
    if len(pairs) < len(pairing.pairs):
        quantized = _on_a_grid(prepared, pairing, thresholds, progress)
        modules, tensors = modules | quantized.modules, tensors | quantized.tensors
        pairing = replace(pairing, problems=(*pairing.problems, *quantized.problems))
    return pairing, modules, tensors | dict(pairing.others), replay.also


def _on_a_grid(
    prepared: Prepared, pairing: Pairing, thresholds: Thresholds, progress: Callable[[int, int], None]
) -> "Judged":
    """What the merged file has in quantised tensors."""
    from d2surgery.auditing.grid_rules import judged  # which few have
    from d2surgery.auditing.grids import measure

    pairs = [pair for pair in pairing.pairs if pair.info.grid]
    with one_thread():
        measured = measure(prepared.merger, pairs, progress)
    kinds = {name: entry.kind for name, entry in prepared.fit.layout.adapters.items()}
    return judged(measured, pairs, kinds, thresholds)


def _settle_recipes(replay: Replay, pairs: tuple[TensorPair, ...]) -> None:
    """One recipe per module, and one for all of them if it can be: small weights fit several."""
    count: Counter[str] = Counter()
    for tally in replay.modules.values():
        if tally.nearest is None:
            count.update(dict.fromkeys(tally.recipes, tally.comparison.elements))
    if len(count) < 2:
        return
    for name, _ in count.most_common():
        other = {m for m, tally in replay.modules.items() if tally.nearest is None and tally.recipes != {name}}
        again = [
            p
            for p in pairs
            if p.status != "tied" and other & set(p.modules) and p.output.site and p.output.site.patches
        ]
        if not again:
            return
        second = Replay(replay.merger, frozenset((name,)))
        second.run(again, lambda done, total: None)
        for module in other:
            mixed = len(replay.modules[module].recipes) > 1
            if second.modules[module].comparison.mismatched == 0 or (mixed and name == count.most_common()[-1][0]):
                replay.modules[module] = second.modules[module]


def _judged(
    prepared: Prepared, replay: Replay, pairs: tuple[TensorPair, ...], limits: Thresholds
) -> Iterator[tuple[str, ModuleAudit]]:
    tensors: dict[str, list[TensorPair]] = {}
    for pair in pairs:
        for module in dict.fromkeys(p.module for p in pair.output.site.patches) if pair.output.site else ():
            if pair.status != "tied":
                tensors.setdefault(module, []).append(pair)
    tallies = {module: tally for module, tally in replay.modules.items() if tally.comparison.elements}
    for module, found in _diagnosed(prepared, tallies):
        held, tally = tensors[module], tallies[module]
        names, kind = tuple(pair.name for pair in held), prepared.fit.layout.adapters[module].kind
        yield module, judge_module(module, kind, names, _dtype(held[0], tally), tally, found, limits)


def _diagnosed(prepared: Prepared, tallies: Mapping[str, Tally]) -> Iterator[tuple[str, Diagnosis | None]]:
    """What is wrong with each module that no recipe gives; what was wrong with some is suspected of all the others."""
    before, modules = Diagnosis(), list(tallies)

    def diagnosed(module: str) -> Diagnosis | None:
        tally = tallies[module]
        return diagnosis_of(prepared, tally, before) if tally.first and tally.finite else None

    for module in modules[:ALIKE]:
        found = diagnosed(module)
        before = found if found and found.code else before
        yield module, found
    rest = modules[ALIKE:]
    for number, (module, found) in enumerate(zip(rest, ahead(diagnosed, rest, workers()), strict=True)):
        if found is not None and number % ALIKE == 0:
            trim()
        yield module, found
    trim()


def _dtype(pair: TensorPair, tally: Tally) -> str:
    """The coarser of the file's and the grid's."""
    return next((name for name, dtype in DTYPES.items() if dtype == tally.grid), pair.info.dtype)


def commonest(modules: Mapping[str, ModuleAudit]) -> str | None:
    count: Counter[str] = Counter()
    for module in modules.values():
        if module.recipe and module.verdict == "pass" and (not module.code or module.mismatched_elements <= FEW):
            count[module.recipe] += module.elements
    return count.most_common(1)[0][0] if count else None


def _is_base(base: BaseWeights, pair: TensorPair) -> bool:
    """Whether a tensor that should have been replaced is still the base's."""
    site = pair.output.site
    if site is None or site.source is None or site.patches:
        return False
    stored, merged = base[site.source], read_tensor(pair.info)
    if stored.shape != merged.shape or not stored.is_floating_point():
        return False
    kept = stored.to(merged.dtype)
    if site.rows is None:
        return torch.equal(merged, kept)
    rows = list(site.rows.indices)
    return torch.equal(merged[rows], kept[rows])
