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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from d2surgery.auditing.findings import Audit, ModuleAudit, Thresholds, verdict_of
from d2surgery.auditing.loading import directory_problems, open_merged
from d2surgery.auditing.receipts import has_receipt, other_receipt
from d2surgery.auditing.settings import compare_settings, in_itself
from d2surgery.errors import D2SurgeryError, Problem, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.formats.layout import Reading
from d2surgery.machine import peak_memory, uncollected
from d2surgery.placement.fit import Fit, fit

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.evaluating.behaviour import Behaviour, TaskGap
    from d2surgery.evaluating.items import Task
    from d2surgery.merging.prepared import Prepared

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
    adapter, fitted, reasons = _fitted(base, adapter, found, strength, reading)
    with uncollected():  # torch, when the three have been found to fit
        from d2surgery.auditing.evidence import commonest, compared
        from d2surgery.auditing.judgement import reasons_of
        from d2surgery.merging.prepared import prepare

    prepared = prepare(fitted, None, "cpu")
    hashes = prepared.check_adapter(hashes=has_receipt(found.directory)).hashes
    pairing, modules, tensors, also = compared(prepared, found, thresholds, progress)
    reasons += [*directory_problems(found, fitted.base), *pairing.problems, *reasons_of(modules, tensors.values())]
    reasons += compare_settings(fitted, found, tied=pairing.tied) if files else ()
    thorough = verdict_of(tuple(reasons)) == "fail"
    reasons += other_receipt(found.directory, fitted.base, hashes, strength, thorough=thorough)
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
        recipe=commonest(modules),
        also=also,
        modules=modules,
        tensors=tensors,
        not_checked=(*pairing.not_checked, *_not_checked(prepared, found, modules, files, behaviour, gap)),
        behaviour=behaviour,
        task=gap,
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory(),
    )


def _fitted(
    base: Directory, adapter: Directory | Sequence[Directory], merged: BaseWeights, strength: float, reading: Reading
) -> tuple[Directory, Fit, list[Problem]]:
    """The adapter to audit, its fit, and a note where it is one of several."""
    note: list[Problem] = []
    if not isinstance(adapter, str | os.PathLike):
        if len(adapter) == 1:
            (adapter,) = adapter
        else:
            with uncollected():  # torch
                from d2surgery.auditing.adapters import nearest

            adapter, note = nearest(base, adapter, merged, strength, reading)
    return adapter, fit(base, adapter, strength, dequantized=True, **reading), note


def _not_checked(
    prepared: "Prepared", merged: BaseWeights, modules: Mapping[str, ModuleAudit], files: bool,
    behaviour: "Behaviour | None", gap: "TaskGap | None",
) -> Iterator[str]:  # fmt: skip
    unread = (name for name in prepared.fit.layout.adapters if name not in modules)
    yield from (f"{name}: its tensor is not in the merged checkpoint" for name in unread)
    if not files:
        yield "config and tokenizer: not asked for"
    elif in_itself(merged):
        yield "tokenizer and generation config in the GGUF file"
    yield from behaviour.not_checked if behaviour else ["outputs and logits"]
    if gap is None:
        yield "answers to questions"


def _run(
    base: Directory, adapter: "Checkpoint", merged: Directory, levels: tuple[str, ...], prompts: Sequence[str] | None,
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
