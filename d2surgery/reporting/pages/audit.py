"""The page of an audit: the verdict first, then why, where, and what to do; every module and tensor below.

It is written for somebody who did not run the merge: the cause and the layers stand in words before any table.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite

from d2surgery.auditing.findings import STATUSES, Audit, ModuleAudit, TensorAudit
from d2surgery.auditing.recipes import RECIPES
from d2surgery.codes import CODES
from d2surgery.errors import Problem
from d2surgery.evaluating.behaviour import LAYER_FACTOR, Behaviour, TaskGap
from d2surgery.evaluating.divergence import Logits
from d2surgery.measures.fidelity import LOW_GAIN
from d2surgery.reporting.figures.audit import STATES, mismatch_map, output_errors, status_map, strength_map
from d2surgery.reporting.pages.parts import (
    Figures,
    counted,
    joined,
    monospace,
    number_cell,
    safe,
    table,
    text_cell,
    whole_page,
)
from d2surgery.reporting.tidy import address, types
from d2surgery.surveying.order import in_order

TITLES = {
    "pass": "the merged checkpoint is the base with the adapter",
    "fail": "the merged checkpoint is not the base with the adapter",
    "inconclusive": "whether the merged checkpoint is the base with the adapter could not be decided",
}
SEVERITIES = ("error", "warning", "info")
WORDS = {"error": "Error", "warning": "Warning", "info": "Note"}
TENSORS = {
    "adapted": "hold the adapter's delta",
    "unchanged": "the base's, bit for bit",
    "replaced": "replaced by the adapter's own",
    "tied": "the same as another tensor",
    "resized": "of another shape",
    "changed": "other than they should be",
    "missing": "not there",
    "extra": "neither the base's nor the adapter's",
}
MOST = 4  # lines per cause, where the worst are shown
RIGHT = ("adapted", "unchanged", "replaced", "tied")


def audit_page(found: Audit) -> str:
    """The whole page of one audit."""
    figures = Figures()
    title = f"{found.verdict.capitalize()}: {TITLES[found.verdict]}"
    parts = [f'<h1><span class="verdict {found.verdict}">{found.verdict.upper()}</span> {safe(TITLES[found.verdict])}'
             "</h1>", *_body(found, figures, "h2")]  # fmt: skip
    return whole_page(title, parts)


def audit_section(found: Audit, figures: Figures) -> str:
    """The same as a part of a report."""
    badge = f'<span class="verdict {found.verdict}">{found.verdict.upper()}</span>'
    return "\n".join([f"<h2>The merged checkpoint</h2><p>{badge} {safe(TITLES[found.verdict])}.</p>",
                      *_body(found, figures, "h3")])  # fmt: skip


def _body(found: Audit, figures: Figures, heading: str) -> Iterator[str]:
    def head(text: str) -> str:
        return f"<{heading}>{text}</{heading}>"

    yield f"<p>{_what(found)}</p>"
    yield from (_reason(problem, found) for problem in _by_weight(found))
    if first := _first(found):
        yield head("Where to look first") + first
    if found.modules:
        yield head("Layer by layer") + "".join(_maps(found, figures))
        yield head("Every adapted module") + _modules(found)
    if found.behaviour is not None:
        yield head("What the merged model says") + _behaviour(found.behaviour, figures)
    if found.task is not None:
        yield head("Answers to questions") + _answers(found.task)
    yield head("Every tensor") + _tensors(found)
    yield head("What was not checked") + _not_checked(found)
    yield head("How this was judged") + _judged(found)


# Words ----------------------------------------------------------------------------------------------------------------


def _what(found: Audit) -> str:
    counts = found.coverage
    named = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    unaccounted = sum(counts[status] for status in STATUSES if status not in RIGHT)
    return (
        f"{monospace(found.merged)} was compared with {monospace(found.base)} + {monospace(found.adapter)}. "
        f"{_made_by(found)} {counted(counts['total'], 'tensor')}: {', '.join(named)}; "
        f"<b>{unaccounted or 'none'} not as {'they' if unaccounted != 1 else 'it'} should be</b>."
    )


def _made_by(found: Audit) -> str:
    states: list[str] = [record.status for record in found.modules.values()]
    if not states:
        return ""
    parts = {name: safe(f"{states.count(name)} {STATES[name][2]}") for name in STATES if states.count(name)}
    right = next((name for name in ("replayed", "rounding") if name in parts), None)
    if found.recipe and right:
        what = {recipe.name: recipe.what for recipe in RECIPES}
        parts[right] += f" by recipe {monospace(found.recipe)} ({safe(what.get(found.recipe, ''))})"
    return f"{counted(len(states), 'adapted module')}: {joined([*parts.values()])}."


def _by_weight(found: Audit) -> list[Problem]:
    """Errors first, of equal severity what concerns most modules."""
    return sorted(
        found.reasons, key=lambda problem: (SEVERITIES.index(problem.severity), -len(_concerned(problem, found)))
    )


def _concerned(problem: Problem, found: Audit) -> list[str]:
    """The adapted modules that a reason is about: the record names only the first of them."""
    if problem.code == "LOW_SURVIVAL":
        return [name for name, m in found.modules.items() if m.verdict == "pass" and m.survival.gain < LOW_GAIN]
    return [name for name, record in found.modules.items() if record.code == problem.code]


def _reason(problem: Problem, found: Audit) -> str:
    known = CODES[problem.code]
    modules = _concerned(problem, found)
    where = _places(modules, found) if len(modules) > 1 else monospace(problem.module) if problem.module else ""
    wanted = f" Wanted {safe(problem.wanted)}, got {safe(problem.got)}." if problem.wanted or problem.got else ""
    return (
        f'<section class="reason {problem.severity}"><p><b>{WORDS[problem.severity]}: {safe(known.meaning)}</b> '
        f"<code>{safe(problem.code)}</code></p>{f'<p><b>Where</b>: {where}</p>' if where else ''}"
        f"<p><b>Found</b>: {safe(problem.message)}.{wanted}</p><p><b>What to do</b>: {safe(known.remedy)}</p></section>"
    )


def _places(modules: Sequence[str], found: Audit) -> str:
    """Types of modules and their layers, in words: `self_attn.q_proj of layers 3 to 7; all 7 types of layer 9`."""
    kinds = types(found.modules)
    layers: dict[str, list[int]] = {}
    for module in modules:
        layers.setdefault(kinds[module], []).append(-1 if (at := address(module).layer) is None else at)
    alike: dict[tuple[int, ...], list[str]] = {}
    for kind, numbers in layers.items():
        alike.setdefault(tuple(sorted(set(numbers))), []).append(kind)
    every = set(kinds.values())
    parts = []
    for at_layers, names in alike.items():
        shown = (
            f"all {len(every)} types of module" if len(names) == len(every) > 1 else joined([*map(monospace, names)])
        )
        parts.append(f"{shown}{_in_layers(at_layers)}")
    whole = "every adapted module: " if len(modules) == len(found.modules) else f"{len(modules)} modules: "
    return whole + "; ".join(parts)


def _in_layers(numbers: Sequence[int]) -> str:
    """` of layers 0 to 3 and 7`; nothing for what stands outside the layers."""
    inside = [number for number in numbers if number >= 0]
    if not inside:
        return ""
    runs: list[list[int]] = []
    for number in inside:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = joined([f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs])
    return f" of {'layer' if len(inside) == 1 else 'layers'} {text}"


def _first(found: Audit) -> str:
    """The worst few modules of each code, and the tensors beside them that are not as they should be."""
    bad: dict[str, list[ModuleAudit]] = {}
    for record in in_order(found.modules).values():
        if record.verdict != "pass":
            bad.setdefault(record.code, []).append(record)
    groups = sorted(bad.values(), key=lambda group: group[0].verdict != "fail")
    chosen = [record for group in groups for record in sorted(group, key=_badness, reverse=True)[:MOST]]
    beside = [t for t in found.tensors.values() if t.code and not t.modules]
    if not chosen and not beside:
        return ""
    heads = ["module or tensor", "what is wrong", "layer", "strength", "elements that differ", "first at"]
    lines = [*(_module_line(record, found.tensors) for record in chosen), *map(_tensor_line, beside[:MOST])]
    left = sum(map(len, bad.values())) - len(chosen) + len(beside[MOST:])
    more = f'<p class="soft">{left} more are in the tables below.</p>' if left else ""
    return table(heads, lines, words=2) + more


def _badness(record: ModuleAudit) -> tuple[bool, float, float]:
    off = abs(record.strength - 1)
    return record.verdict == "fail", off if isfinite(off) else 0.0, record.mismatched_elements / max(record.elements, 1)


def _module_line(record: ModuleAudit, tensors: Mapping[str, TensorAudit]) -> list[str]:
    return [
        text_cell(record.module),
        text_cell(f"{record.code}: {record.message}"),
        number_cell(address(record.module).layer),
        _strength_cell(record),
        number_cell(record.mismatched_elements / max(record.elements, 1), percent=True),
        text_cell(_first_mismatch(record, tensors)),
    ]


def _tensor_line(tensor: TensorAudit) -> list[str]:
    layer = address(tensor.name).layer
    share = tensor.mismatched_elements / max(tensor.elements, 1)
    return [
        text_cell(tensor.name),
        text_cell(f"{tensor.code}: {TENSORS[tensor.status]}"),
        number_cell(layer),
        number_cell(None),
        number_cell(share, percent=True),
        text_cell(_at(tensor.first_mismatch)),
    ]


def _at(index: tuple[int, ...] | None) -> str:
    return "–" if index is None else str(list(index))


def _first_mismatch(record: ModuleAudit, tensors: Mapping[str, TensorAudit]) -> str:
    index = record.first_mismatch
    for name in record.tensors:
        if index is None and name in tensors:
            index = tensors[name].first_mismatch
    return _at(index)


# Figures and tables ---------------------------------------------------------------------------------------------------


def _maps(found: Audit, figures: Figures) -> Iterator[str]:
    yield figures.add(status_map(found.modules), heading="h4")
    if any(isfinite(record.strength) and record.strength != 1 for record in found.modules.values()):
        yield figures.add(strength_map(found.modules, found.thresholds), heading="h4")
    if any(record.mismatched_elements for record in found.modules.values()):
        yield figures.add(mismatch_map(found.modules), heading="h4")


def _modules(found: Audit) -> str:
    heads = ["module", "type", "kind", "result", "code", "recipe", "layer", "strength", "± ", "residual", "differ",
             "elements", "survival", "furthest off"]  # fmt: skip
    kinds = types(found.modules)
    lines = [
        [
            *map(text_cell, (record.module, kinds[record.module], record.kind, STATES[record.status][2])),
            text_cell(record.code or "–", record.message),
            text_cell(
                (record.status != "wrong" and record.recipe) or "–"
            ),  # what comes nearest to a fault says nothing
            number_cell(address(record.module).layer),
            *map(number_cell, (record.strength, record.strength_error, record.residual)),
            *map(number_cell, (record.mismatched_elements, record.elements, record.survival.gain)),
            text_cell(_furthest(record.ulps)),
        ]
        for record in sorted(in_order(found.modules).values(), key=lambda record: -[*STATES].index(record.status))
    ]
    note = (
        "What is wrong stands first; press a heading to sort by it. result, recipe: which merger's arithmetic gives "
        "the file's bits, or comes nearest. strength: 1 is the whole delta once. residual: what is left of the "
        "difference at the best strength, relative to the delta. survival: share of the delta that rounding to this "
        "dtype left, in a right merge too. furthest off: in units in the last place."
    )
    return f'<p class="soft">{note}</p>{table(heads, lines, words=6, sortable=True)}'


def _strength_cell(record: ModuleAudit) -> str:
    if not isfinite(record.strength):
        return number_cell(None)
    error = f" ± {record.strength_error:.1g}" if isfinite(record.strength_error) else ""
    return f'<td data-v="{record.strength!r}">{record.strength:.4g}{error}</td>'


def _furthest(ulps: Mapping[str, int]) -> str:
    return next((name for name, count in reversed([*ulps.items()]) if count), "–")


def _tensors(found: Audit) -> str:
    counts = found.coverage
    summary = table(
        ["status", "what that means", "tensors"],
        [[text_cell(s), text_cell(TENSORS[s]), number_cell(counts[s])] for s in STATUSES if counts[s]],
        words=2,
    )
    wrong = [tensor for tensor in in_order(found.tensors).values() if tensor.code or tensor.status not in RIGHT]
    right = [tensor for tensor in in_order(found.tensors).values() if tensor not in wrong]
    parts = [summary]
    if wrong:
        parts.append(_tensor_table(wrong))
    if right:
        title = f"{counted(len(right), 'tensor')} as {'it' if len(right) == 1 else 'they'} should be"
        parts.append(f"<details><summary>{title}</summary>{_tensor_table(right)}</details>")
    return "".join(parts)


def _tensor_table(tensors: Iterable[TensorAudit]) -> str:
    heads = ["tensor", "status", "code", "dtype", "shape", "elements", "differ", "first at"]
    lines = [
        [
            *map(text_cell, (t.name, t.status, t.code or "–", t.dtype, "×".join(map(str, t.shape)))),
            number_cell(t.elements),
            number_cell(t.mismatched_elements),
            text_cell(_at(t.first_mismatch)),
        ]
        for t in tensors
    ]
    return table(heads, lines, words=5, sortable=True)


# Behaviour ------------------------------------------------------------------------------------------------------------


def _behaviour(found: Behaviour, figures: Figures) -> str:
    what = (
        f"<p>{counted(found.prompts, 'prompt')}, {counted(found.tokens, 'token')}, in {found.reference_dtype}: "
        "base with the adapter live in it against the merged model. "
    )
    if found.first_deviating:
        name = f"<b>{monospace(found.first_deviating)}</b>"
        what += (
            f"The first module whose output deviates by {LAYER_FACTOR:g} times what a right merge's does is {name}.</p>"
        )
    else:
        what += f"No module's output deviates by {LAYER_FACTOR:g} times what a right merge's does.</p>"
    parts = [what]
    if found.logits is not None:
        parts.append(_logits(found.logits))
    if len(found.layers) > 1:
        parts.append(figures.add(output_errors(found.layers), heading="h4"))
    return "".join(parts)


def _logits(found: Logits) -> str:
    """Next-token distributions, beside what a right merge and serving unmerged in that dtype would lose."""
    ppl = [found.perplexity, found.perplexity_merged]
    lines = [
        ("KL, mean (nats)", found.kl_mean, found.rounding_floor, found.noise_floor),
        ("KL, 99th percentile", found.kl_p99, None, None),
        ("KL, largest", found.kl_max, None, None),
        ("KL that the adapter itself makes", found.effect, None, None),
        ("same first choice, share", found.top1_agreement, None, found.noise_top1_agreement),
        ("first choices turned beyond doubt", found.flips, None, None),
        ("largest change of a logit", found.max_abs, None, found.noise_max_abs),
        ("change of logits, rms", found.rms, found.rounding_rms, None),
        ("strength, from the logits", found.strength, 1.0, None),
        ("perplexity, base + adapter", ppl[0], None, None),
        ("perplexity, merged", ppl[1], None, None),
    ]
    rows = [[text_cell(name), *map(number_cell, numbers)] for name, *numbers in lines if numbers[0] is not None]
    heads = ["of next-token distributions", "merged", "a right merge", "serving unmerged"]
    return table(heads, rows, words=1)


def _answers(found: TaskGap) -> str:
    low, high = found.ci_pp
    what = (
        f"<p>Merging changes accuracy by <b>{found.gap_pp:+.2f} points</b> on average (95 % interval {low:+.2f} to "
        f"{high:+.2f}), most in {monospace(found.worst_task)} ({found.worst_gap_pp:+.2f}). {found.lost} answers were "
        f"lost and {found.gained} gained (McNemar p = {found.mcnemar_p:.2g}). A gap of {found.margin_pp:g} points or "
        f"more is {'' if found.equivalent else 'not '}refuted for every task.</p>"
    )
    heads = ["task", "answered by", "items", "before", "merged", "gap", "from", "to", "lost", "gained", "p"]
    rows = [
        [
            *map(text_cell, (each.task, each.by)),
            number_cell(each.gap.items),
            number_cell(each.gap.accuracy_before, percent=True),
            number_cell(each.gap.accuracy_after, percent=True),
            *map(number_cell, (each.gap.gap_pp, *each.gap.ci_pp, each.gap.lost, each.gap.gained, each.gap.mcnemar_p)),
        ]
        for each in found.tasks
    ]
    return what + table(heads, rows, words=2)


# How it was judged ----------------------------------------------------------------------------------------------------


def _not_checked(found: Audit) -> str:
    items = "".join(f"<li>{safe(item)}</li>" for item in found.not_checked)
    return f"<ul>{items}</ul>" if items else "<p>Nothing was left out at the levels that were asked for.</p>"


def _judged(found: Audit) -> str:
    limits = found.thresholds
    bits = "One differing bit in an adapted tensor fails (<code>--exact</code>). " if limits.exact else ""
    return (
        f"<p>Levels: {safe(', '.join(found.levels))}. {bits}First the merge is replayed by every known merger's "
        "arithmetic; a replay without one differing bit is proof. Where none replays, the strength of the delta is "
        f"estimated: within {limits.strength_pass:g} of 1 is right, beyond {limits.strength_fail:g} and five standard "
        "errors is wrong, between is open. The share of unchanged elements is never a criterion: most elements of a "
        "small delta round back to the base in a right merge.</p>"
    )
