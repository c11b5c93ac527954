"""Does the merged model say what base and adapter say? Outputs of layers, logits, and answers to questions.

Five models run on the same tokens, one after the other: `reference`, the base with the adapter live in it, one
precision above the merged checkpoint's; `base` alone; `served`, the live model in the merged checkpoint's own dtype,
which is what serving the adapter unmerged costs; `right`, the effective weights rounded once, which is what a right
merge must lose; and `merged`. All but `served` compute in the reference's precision, so that weights alone count: in
bfloat16, computing loses twenty times as much as rounding the weights, and would hide a layer that was forgotten.

Memory: one model in the reference's precision, and the logits of reference and base on all tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from d2surgery.checkpoint import Checkpoint, load
from d2surgery.errors import D2SurgeryError, Problem, Severity, refuse
from d2surgery.evaluating.divergence import Logits, LogitSums
from d2surgery.evaluating.items import By, Task, Template
from d2surgery.evaluating.paired import Gap, Interval, mcnemar, mean_gap, paired_gap
from d2surgery.evaluating.prompts import PROMPTS
from d2surgery.evaluating.scoring import Directory, Models, scores
from d2surgery.evaluating.tasks import Progress, Score, score_all, silent
from d2surgery.evaluating.traces import Layer, LayerSums, Trace, trace
from d2surgery.files.base import BaseWeights
from d2surgery.live.loading import (
    load_model,
    load_tokenizer,
    merged_in_memory,
    model_kind,
    stored_dtype,
    unmerged,
)

KL_FACTOR = 2.0  # KL above this many times a right merge's is a difference
EFFECT_FAIL = 0.10  # … and a failure above this share of the adapter's effect, or KL_FACTOR times what serving loses
LAYER_FACTOR, LAYER_FAIL = 2.0, 3.0  # an output's error above this many times a right merge's
STRENGTH_OFF = 0.02  # |λ − 1| above it matters, if it is also
LIKELY, CERTAIN = 3.0, 5.0  # … this many standard errors: a warning, a failure
MARGIN_PP = 0.5  # of accuracy
SURE = 0.01  # McNemar's p of all tests together

_MOST_TOKENS = 512  # of one prompt
_RANDOM = (8, 24)  # prompts and tokens, where there is no tokenizer


@dataclass(frozen=True, kw_only=True, repr=False)
class Behaviour:
    """What was compared, what differs. `layers` are in the order in which they run."""

    prompts: int
    tokens: int
    merged_dtype: str
    reference_dtype: str
    logits: Logits | None
    layers: tuple[Layer, ...]
    first_deviating: str | None
    problems: tuple[Problem, ...]
    not_checked: tuple[str, ...]

    def __repr__(self) -> str:
        kl = f"KL {self.logits.kl_mean:.2g} nats, " if self.logits else ""
        first = f"{self.first_deviating} deviates first" if self.first_deviating else "no module deviates"
        return f"Behaviour({self.prompts} prompts, {self.tokens} tokens: {kl}{first}; {_codes(self.problems)})"


def compare_outputs(
    base: Directory,
    adapter: Checkpoint | Directory,
    merged: Directory,
    *,
    prompts: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Behaviour:
    """Run base + adapter and merged on prompts (None: the bundled ones). progress(done, total) counts forwards.

    `problems`: LAYER_DIFFERS, LOGITS_DIFFER. Raises D2SurgeryError NOT_RUNNABLE when transformers cannot run a model,
    and what reading base, adapter and merged raises.
    """
    checkpoint = adapter if isinstance(adapter, Checkpoint) else load(adapter)
    weights = BaseWeights(merged)
    to = stored_dtype(weights.header)
    wide = torch.float32 if to in (torch.bfloat16, torch.float16) else torch.float64
    kind = model_kind(base, checkpoint.layout.about)
    if getattr(kind, "main_input_name", "") != "input_ids":
        return _behaviour((), to, wide, None, (), [f"outputs and logits: a {kind.__name__} does not read tokens"])
    tokens, notes = _tokens(base, merged, prompts)
    steps = iter(range(1, 5 * len(tokens) + 1))

    def run(model: nn.Module, given: Sequence[Trace] | None = None) -> Iterator[Trace]:
        for at, ids in enumerate(tokens):
            yield trace(model, ids.to(device), given[at] if given else None)
            progress(next(steps), 5 * len(tokens))

    options: dict[str, Any] = {"device": device, "kind": kind}
    reference = list(run(unmerged(base, checkpoint, dtype=wide, **options)))
    layers = LayerSums(reference)
    plain = _base(base, wide, options)
    bases = [layers.add("base", at, found) for at, found in enumerate(run(plain, reference))] if plain else None
    del plain
    wanted = [found.logits for found in reference if found.logits is not None]
    sums = LogitSums(wanted, bases, tokens if _is_causal(kind) else None) if wanted else None
    others: dict[str, Callable[[], nn.Module]] = {
        "served": lambda: unmerged(base, checkpoint, dtype=to, **options),
        "right": lambda: merged_in_memory(base, checkpoint, to=to, dtype=wide, **options),
        "merged": lambda: load_model(merged, dtype=wide, **options),
    }
    for name, make in others.items():
        for at, found in enumerate(run(make(), reference)):
            said = layers.add(name, at, found)
            if sums:
                sums.add(name, at, said)
    if sums is None:
        notes.append(f"logits: a {kind.__name__} has none")
    return _behaviour(tokens, to, wide, sums.record() if sums else None, layers.records(wide), notes)


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task, answered in one way by base + adapter ("before") and by the merged model ("after")."""

    task: str
    by: str
    gap: Gap


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskGap:
    """The gap in accuracy that merging made, in percentage points, as papers report it: its mean and its worst."""

    gap_pp: float  # mean over tasks and ways of answering
    ci_pp: Interval  # 95 %, paired bootstrap
    worst_gap_pp: float
    worst_task: str
    lost: int  # questions answered rightly before and wrongly after, over all tasks
    gained: int
    mcnemar_p: float  # of all flips together
    margin_pp: float
    equivalent: bool  # a gap of the margin or more is refuted for every task
    tasks: tuple[TaskComparison, ...]
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        low, high = self.ci_pp
        worst = f"worst {self.worst_gap_pp:+.2f} in {self.worst_task}"
        return f"TaskGap({self.gap_pp:+.2f} points ({low:+.2f} to {high:+.2f}), {worst}; {_codes(self.problems)})"


def compare_scores(before: Sequence[Score], after: Sequence[Score], *, margin_pp: float = MARGIN_PP) -> TaskGap:
    """What two models chose on the same items. `problems`: TASK_GAP.

    A gap counts as real when McNemar's p, times the number of tests, is below 1 %, and as a failure when it is also
    above the margin. Without flips enough to tell, a note says how many items would be needed.
    """
    found = tuple(
        TaskComparison(task=old.task, by=old.by, gap=paired_gap(old.gold, old.picked, new.picked))
        for old, new in zip(before, after, strict=True)
    )
    mean, interval = mean_gap(one.gap for one in found)
    worst = max(found, key=lambda one: abs(one.gap.gap_pp))
    lost, gained = sum(one.gap.lost for one in found), sum(one.gap.gained for one in found)
    return TaskGap(
        gap_pp=mean,
        ci_pp=interval,
        worst_gap_pp=worst.gap.gap_pp,
        worst_task=worst.task,
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar(lost, gained),
        margin_pp=margin_pp,
        equivalent=all(one.gap.equivalent(margin_pp) for one in found),
        tasks=found,
        problems=tuple(_task_problems(found, mean, mcnemar(lost, gained), margin_pp)),
    )


def compare_tasks(
    base: Directory,
    adapter: Checkpoint | Directory,
    merged: Directory,
    tasks: Sequence[Task],
    *,
    by: Sequence[By] = ("likelihood",),
    template: Template = "auto",
    margin_pp: float = MARGIN_PP,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> TaskGap:
    """Answers of base + adapter and of the merged model to the same questions, both computed in `dtype`.

    `dtype` None is float32 on a CPU, the merged checkpoint's elsewhere. progress(done, total) counts items, all ways
    of answering by both models. Raises NOT_RUNNABLE, BAD_DATA, and what reading base, adapter and merged raises.
    """

    def answer(model: nn.Module, tokenizer: Any, told: Progress) -> list[Score]:
        return score_all(model, tokenizer, tasks, by=by, template=template, progress=told)

    models = Models(base=base, adapter=adapter, merged=merged, dtype=dtype, device=device)
    found = scores(models, answer, progress)
    return compare_scores(found["unmerged"], found["merged"], margin_pp=margin_pp)


# Preparing -------------------------------------------------------------------------------------------------------


def _base(base: Directory, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module | None:
    """The base alone; None where it has no head of its own."""
    try:
        return load_model(base, dtype=dtype, **options)
    except D2SurgeryError:
        return None  # `unmerged` has loaded it a moment ago: only what the adapter brings can be missing


def _tokens(base: Directory, merged: Directory, prompts: Sequence[str] | None) -> tuple[list[Tensor], list[str]]:
    """One row of token ids per prompt, and what is to be said about them."""
    tokenizer = load_tokenizer(merged, base)
    config = BaseWeights(base).config
    text = config.get("text_config") or config
    most = min(int(text.get(key) or _MOST_TOKENS) for key in ("max_position_embeddings", "n_positions", ""))
    if tokenizer is None:
        if prompts is not None:
            raise refuse("NOT_RUNNABLE", "no tokenizer for the prompts", file=str(merged))
        shape = (_RANDOM[0], min(_RANDOM[1], most))
        ids = torch.randint(int(text.get("vocab_size") or 100), shape, generator=torch.Generator().manual_seed(0))
        return list(ids[:, None]), ["prompts: there is no tokenizer, so random tokens were used"]
    rows = [tokenizer(text)["input_ids"][:most] for text in (PROMPTS if prompts is None else prompts)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise refuse("BAD_DATA", "no prompt has two tokens")
    return [torch.tensor([row]) for row in rows], []


def _is_causal(kind: Any) -> bool:
    return bool(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _behaviour(
    tokens: Sequence[Tensor], to: torch.dtype, wide: torch.dtype, logits: Logits | None, layers: tuple[Layer, ...],
    notes: Sequence[str],
) -> Behaviour:  # fmt: skip
    first = next((layer for layer in layers if _deviates(layer)), None)
    return Behaviour(
        prompts=len(tokens),
        tokens=sum(ids.shape[1] for ids in tokens),
        merged_dtype=_short(to),
        reference_dtype=_short(wide),
        logits=logits,
        layers=layers,
        first_deviating=first.module if first else None,
        problems=(*_layer_problems(layers), *(_logit_problems(logits, wide) if logits else ())),
        not_checked=tuple(notes),
    )


def _codes(problems: Sequence[Problem]) -> str:
    return ", ".join(f"{problem.severity} {problem.code}" for problem in problems) or "no problem"


# Verdicts --------------------------------------------------------------------------------------------------------


def _deviates(layer: Layer) -> bool:
    return max(layer.excess, layer.own_excess) > LAYER_FACTOR


def _layer_problems(layers: Sequence[Layer]) -> Iterator[Problem]:
    """The first module that differs, and which differ by themselves: the others only pass on what they are given."""
    off = [layer for layer in layers if _deviates(layer)]
    if not off:
        return
    alone = [layer.module for layer in off if layer.own_excess > LAYER_FACTOR]
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    message = "the first output that differs"
    if alone:
        message = f"given the same input, {'this differs' if len(alone) == 1 else 'these differ'}: "
        message += f"{', '.join(alone[:3])}{more}"
    worst = max(max(layer.excess, layer.own_excess) for layer in off)
    yield Problem(
        code="LAYER_DIFFERS", message=message, severity="error" if worst > LAYER_FAIL else "warning",
        module=off[0].module, wanted=f"at most {LAYER_FACTOR:g} times a right merge's error",
        got=f"{max(off[0].excess, off[0].own_excess):.3g} times, at worst {worst:.3g}",
    )  # fmt: skip


def _logit_problems(found: Logits, wide: torch.dtype) -> Iterator[Problem]:
    if not isfinite(found.kl_mean):
        yield Problem(code="LOGITS_DIFFER", message="the merged model's logits are no numbers")
        return
    noise = max(found.rounding_floor, found.noise_floor if wide == torch.float64 else 0.0)
    if found.kl_mean > KL_FACTOR * noise:
        share = found.relative_to_effect
        severe = share is None or share > EFFECT_FAIL or found.flips or found.kl_mean > KL_FACTOR * found.noise_floor
        of_effect = "" if share is None else f", by {share:.2g} of the adapter's own effect"
        message = f"the merged model's distributions differ by more than rounding explains{of_effect}"
        want, got = f"KL at most {KL_FACTOR * noise:.2g}", f"{found.kl_mean:.2g}, up to {found.kl_max:.2g}"
        severity: Severity = "error" if severe else "warning"
        yield Problem(code="LOGITS_DIFFER", message=message, severity=severity, wanted=want, got=got)
    if found.strength is not None and found.strength_error is not None:
        off = abs(found.strength - 1)
        if off > STRENGTH_OFF and off > LIKELY * found.strength_error:
            message = "the adapter's effect on the logits has another strength than in a right merge"
            severity = "error" if off > CERTAIN * found.strength_error else "warning"
            got = f"{found.strength:.3f} ± {found.strength_error:.2g}"
            yield Problem(code="LOGITS_DIFFER", message=message, severity=severity, wanted="1", got=got)


def _task_problems(
    found: Sequence[TaskComparison], mean: float, pooled_p: float, margin_pp: float
) -> Iterator[Problem]:
    tests = len(found) + 1
    gaps = [("all tasks", mean, pooled_p)] if len(found) > 1 else []
    gaps += [(f"{one.task}, by {one.by}", one.gap.gap_pp, one.gap.mcnemar_p) for one in found]
    real = [(where, gap, p) for where, gap, p in gaps if p * tests < SURE]
    for where, gap, p in real:
        yield Problem(
            code="TASK_GAP", severity="error" if abs(gap) > margin_pp else "warning", module=where,
            message="merging changed the accuracy", wanted=f"within ±{margin_pp:g} points",
            got=f"{gap:+.2f} points, McNemar p = {p:.2g}",
        )  # fmt: skip
    open_ = [one.gap for one in found if not one.gap.equivalent(margin_pp)]
    if open_ and not real:
        need = max(gap.items_needed(margin_pp) for gap in open_)
        yield Problem(
            code="TASK_GAP", severity="info", message=f"too few items to refute a gap of {margin_pp:g} points",
            wanted=f"about {need} items per task", got=f"{min(gap.items for gap in open_)}",
        )  # fmt: skip
