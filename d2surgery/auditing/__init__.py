"""Is a merged checkpoint the base with the adapter? Every tensor accounted for, every difference explained.

First the merge is replayed: our own way, then by the bank of recipes. What no recipe gives bit for bit is measured:
its strength λ̂ with a standard error, and whether what is left is rounding. What is wrong gets a name.

The rules, per module (docs/mathematics.md#strength):
- Every bit as a recipe gives it: right.
- A usual fault leaves less unexplained than a right merge does, significantly: that fault.
- λ̂ off by more than `strength_fail` and five standard errors: WRONG_STRENGTH; by less than `strength_pass`: right; in
  between: open. In a float32 file rounding cannot move λ̂: there both are at most 1e-5 and the residual.
- Differences that rounding does not make: TENSOR_CHANGED for single elements, ROUNDING_EXCESS for noise.
The share of unchanged entries decides nothing: a right merge of a small delta in bfloat16 leaves most of them.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch

from d2surgery.auditing.adapters import nearest
from d2surgery.auditing.blocks import diagnosis_of
from d2surgery.auditing.casts import cast_before
from d2surgery.auditing.diagnosis import Diagnosis
from d2surgery.auditing.findings import Audit, ModuleAudit, TensorAudit, Thresholds, verdict_of
from d2surgery.auditing.judgement import (
    FEW,
    isolated,
    judge_module,
    judge_tensor,
    pooled,
    reasons_of,
    shared_twice,
    wrong_base,
)
from d2surgery.auditing.likeness import another_adapter
from d2surgery.auditing.loading import directory_problems, open_merged
from d2surgery.auditing.marking import with_structure
from d2surgery.auditing.pairing import Pairing, TensorPair, pair_up
from d2surgery.auditing.receipts import has_receipt, other_receipt
from d2surgery.auditing.replay import ALIKE, Replay
from d2surgery.auditing.settings import compare_settings
from d2surgery.auditing.tally import Tally
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError, Problem, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import DTYPES, read_tensor
from d2surgery.formats.layout import Reading
from d2surgery.machine import ahead, one_thread, peak_memory, trim, workers
from d2surgery.merging.prepared import Prepared, prepare
from d2surgery.placement.fit import fit

if TYPE_CHECKING:
    from d2surgery.evaluating.behaviour import Behaviour, TaskGap
    from d2surgery.evaluating.tasks import Task

Directory = str | os.PathLike[str]


def audit(
    base: Directory,
    adapter: Directory | Sequence[Directory],
    merged: Directory,
    *,
    levels: tuple[str, ...] = ("weights",),
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    strength: float = 1.0,
    files: bool = True,
    prompts: Sequence[str] | None = None,
    tasks: "Sequence[Task]" = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    **reading: Unpack[Reading],
) -> Audit:
    """Compare every tensor of `merged` with `base` + `strength`·`adapter`, and the files beside the weights.

    Of several adapters the one is audited that the merged weights are nearest to, and the first of the reasons says so.
    levels: "weights", always looked at; "outputs" or "logits" run the models on `prompts` (None: bundled ones), "task"
    on `tasks`, on `device`. files=False leaves config and tokenizer alone. progress(done, total): bytes. reading:
    expert_layout, scale or alpha of an adapter whose file does not say it, see `Reading`.

    Raises D2SurgeryError for what cannot be audited: unreadable, unfit, or changing meanwhile (BASE_CHANGED and like).
    """
    began, found = time.monotonic(), open_merged(merged)
    adapter, reasons = nearest(base, adapter, found, strength, reading)
    prepared = prepare(fit(base, adapter, strength, **reading), None, "cpu")
    hashes = prepared.check_adapter(hashes=has_receipt(found.directory)).hashes
    pairing = pair_up(prepared, found)
    modules, tensors, also = _compared(prepared, pairing, thresholds, found.header.usual_dtype or "", progress)
    reasons += [*directory_problems(found, prepared.fit.base), *pairing.problems]
    reasons += reasons_of(modules, tensors.values())
    reasons += compare_settings(prepared.fit, found, tied=pairing.tied) if files else ()
    failing = verdict_of(tuple(reasons)) == "fail"
    reasons += other_receipt(found.directory, prepared.fit.base, hashes, strength, thorough=failing)
    behaviour, gap, problems = _run(base, prepared.merger.checkpoint, merged, levels, prompts, tasks, device)
    prepared.refuse_changes()
    found.refuse_changes()
    every = (*reasons, *problems)
    return Audit(
        verdict=verdict_of(every),
        reasons=every,
        base=str(base),
        adapter=str(adapter),
        merged=str(merged),
        levels=levels,
        thresholds=thresholds,
        recipe=_commonest(modules),
        also=also,
        modules=modules,
        tensors=tensors,
        not_checked=(*pairing.not_checked, *_not_checked(prepared, modules, files, behaviour, gap)),
        behaviour=behaviour,
        task=gap,
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
    )


def _compared(
    prepared: Prepared, pairing: Pairing, thresholds: Thresholds, dtype: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, ModuleAudit], dict[str, TensorAudit], tuple[str, ...]]:
    """Every module and every tensor with its evidence, and the recipes that fit, too; `dtype`: the file's usual one."""
    pairs = pairing.pairs
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
    return modules, tensors | dict(pairing.others), replay.also


def _not_checked(
    prepared: Prepared, modules: Mapping[str, ModuleAudit], files: bool, behaviour: "Behaviour | None",
    gap: "TaskGap | None",
) -> Iterator[str]:  # fmt: skip
    unread = (name for name in prepared.fit.layout.adapters if name not in modules)
    yield from (f"{name}: its tensor is not in the merged checkpoint" for name in unread)
    if not files:
        yield "config and tokenizer: not asked for"
    yield from behaviour.not_checked if behaviour else ["outputs and logits"]
    if gap is None:
        yield "answers to questions"


def _run(
    base: Directory, adapter: Checkpoint, merged: Directory, levels: tuple[str, ...], prompts: Sequence[str] | None,
    tasks: "Sequence[Task]", device: str,
) -> tuple["Behaviour | None", "TaskGap | None", list[Problem]]:  # fmt: skip
    """What the models say, where they were asked to and can be run, and what is wrong with it."""
    if not {"outputs", "logits", "task"} & {*levels}:
        return None, None, []
    from d2surgery.evaluating.behaviour import compare_outputs, compare_tasks  # a third of a second

    behaviour = gap = None
    problems: list[Problem] = []
    if {"outputs", "logits"} & {*levels}:
        with _unless_refused(problems):
            behaviour = compare_outputs(base, adapter, merged, prompts=prompts, device=device)
            problems += behaviour.problems
    if "task" in levels:
        if not tasks:
            raise refuse("USAGE", "the level task needs tasks")
        with _unless_refused(problems):
            gap = compare_tasks(base, adapter, merged, tasks, device=device)
            problems += gap.problems
    return behaviour, gap, problems


@contextmanager
def _unless_refused(problems: list[Problem]) -> Iterator[None]:
    """A model that cannot be run leaves its level open; what the weights said stands."""
    try:
        yield
    except D2SurgeryError as error:
        problems.append(replace(error.problems[0], code="NOT_RUNNABLE", severity="warning"))


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


def _commonest(modules: Mapping[str, ModuleAudit]) -> str | None:
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
