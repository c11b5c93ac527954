"""The report: adapters in, one HTML page out that says in words, tables and figures what they do to their base.

The same inputs give the same bytes: no times, and no paths but those that were given.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, sqrt
from statistics import median
from typing import Any

from d2surgery.auditing.findings import Audit
from d2surgery.kinds import TABLE
from d2surgery.measures.drift import Drift
from d2surgery.measures.likeness import Likeness, closest, likeness
from d2surgery.measures.table import MEASURES
from d2surgery.reporting.figures import drifts, spectra
from d2surgery.reporting.figures.likeness import MOST_PAIRS, similarity_by_depth, similarity_matrix
from d2surgery.reporting.figures.parts import Plot, named
from d2surgery.reporting.figures.training import run_curves
from d2surgery.reporting.pages.audit import audit_section
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
from d2surgery.reporting.pages.surgery import surgery_section
from d2surgery.reporting.tidy import address, types
from d2surgery.surveying.adapter import Measured, Survey

OUTLIER = 3.5  # robust standard deviations (MAD) from the median; Iglewicz and Hoaglin's threshold
TOP = 3
SHOWN = (
    "nominal_rank",
    "energy_entropy_rank",
    "stable_rank",
    "energy_rank_90",
    "energy_rank_99",
    "frobenius_norm",
    "rms_entry",
    "spectral_norm",
)  # of every module, in the table
Alike = Mapping[tuple[int, int], Likeness]
Log = Sequence[Mapping[str, Any]]


def report_page(survey: Survey, found: Audit | None = None, runs: Mapping[str, Log] | None = None) -> str:
    """The whole report of one or more adapters, with the audit of a merge where there is one.

    runs: by an adapter's label, the lines that its training logged.
    """
    measured = survey.measured
    title = " and ".join(m.label for m in measured) if len(measured) < 3 else f"{_number_word(len(measured))} adapters"
    return whole_page(f"Report: {title}", _parts(survey, title, found, runs or {}))


def _parts(survey: Survey, title: str, found: Audit | None, runs: Mapping[str, Log]) -> Iterator[str]:
    measured = survey.measured
    alike = {key: likeness(differences) for key, differences in survey.shared.items()}
    figures = Figures()
    yield f"<h1>What {safe(title)} {'does' if len(measured) == 1 else 'do'}</h1>"
    yield f"<p>{_what(measured, survey.base)}</p>"
    yield _facts(measured)
    yield "<h2>What stands out</h2>"
    if alike:
        yield _alike(measured, alike)
    for m in measured:
        yield _standing_out(m, several=len(measured) > 1)
    if found is not None:
        yield audit_section(found, figures)
    for m in measured:
        yield from surgery_section(m.label, m.layout.about.history, figures)
    for label, log in runs.items():
        yield _trained(label, log, figures)
    if alike:
        yield _together(survey, alike, figures)
    yield from _by_measure(measured, figures)
    yield "<h2>Every module</h2>"
    yield _module_table(measured)
    yield "<h2>How this was measured</h2>"
    yield _method(measured)
    yield _files(measured)


# Words ----------------------------------------------------------------------------------------------------------------


def _what(measured: Sequence[Measured], base: str | None) -> str:
    kinds = Counter(" and ".join(TABLE[kind].title for kind in m.layout.kinds) for m in measured)
    what = joined([f"{_number_word(count)} {kind} adapter{'s' * (count > 1)}" for kind, count in kinds.items()])
    bases = sorted({m.layout.base_model for m in measured if m.layout.base_model})
    for_ = f" for {safe(joined(bases))}" if bases else ""
    if base is None:
        against = "No base model was given, so sizes are absolute and drift is not shown (<code>--base</code>)."
    else:
        against = f"Measured against the base in <code>{safe(base)}</code>."
    return (
        f"{what[0].upper()}{what[1:]}{for_}. An adapter changes a model's weights by a small amount, its "
        "<em>delta</em>; this page shows how large that is, how much of the adapter's rank it uses, and where. "
        f"{against}"
    )


def _number_word(count: int) -> str:
    return ("no", "a", "two", "three", "four", "five", "six")[count] if count < 7 else str(count)


def _standing_out(m: Measured, *, several: bool) -> str:
    findings = [*_about_size(m), *_about_rank(m), *_about_layers(m), *_about_drift(m), *_about_intruders(m)]
    findings += [*_about_file(m)]
    items = "".join(f"<li>{finding}</li>" for finding in findings)
    return f"{f'<h3>{safe(m.label)}</h3>' if several else ''}<ul>{items}</ul>"


def _about_size(m: Measured) -> Iterator[str]:
    sizes = {module: size for module, size in m.sizes.items() if isfinite(size)}
    zero = [module for module, record in m.spectra.items() if record.frobenius_norm == 0]
    if len(zero) == len(m.spectra):
        yield "<b>It does nothing</b>: the delta of every module is zero."
        return
    if zero:
        some = counted(len(zero), "module")
        yield f"{some} of {len(m.spectra)} do nothing (zero delta), {monospace(zero[0])} the first."
    middle = median(sizes.values())
    top = sorted(sizes, key=lambda module: sizes[module], reverse=True)[:TOP]
    shown = ", ".join(f"{monospace(module)} ({_size(m, sizes[module])})" for module in top)
    unit = "of the base weight's norm" if m.drifts else "by the entry (root mean square; relative sizes need a base)"
    ratio = f"; the first is {sizes[top[0]] / middle:.1f} times the median" if sizes[top[0]] > 1.15 * middle > 0 else ""
    yield f"<b>Size</b>: a typical module changes by {_size(m, middle)} {unit}. Strongest: {shown}{ratio}."


def _size(m: Measured, value: float) -> str:
    return f"{100 * value:.3g}\u00a0%" if m.drifts else f"{value:.3g}"


def _about_rank(m: Measured) -> Iterator[str]:
    used = [record.energy_entropy_rank for record in m.spectra.values() if record.frobenius_norm > 0]
    room = {module: rank for module, rank in m.nominal.items() if rank and m.spectra[module].frobenius_norm > 0}
    if not used:
        return
    average = sum(used) / len(used)
    if not room:
        yield f"<b>Rank</b>: {average:.3g} directions on average, weighted by energy; this kind has no nominal rank."
        return
    nominal = sum(room.values()) / len(room)
    if average > nominal:
        yield (
            f"<b>Rank</b>: the {m.of} is dense, {average:.3g} directions on average, weighted by energy, where the "
            f"factors alone have room for {nominal:.3g}: rescaling the base makes up the rest."
        )
        return
    half = [module for module, rank in room.items() if m.spectra[module].energy_rank_90 <= rank / 2]
    advice = " Half the rank would keep most of it there." if len(half) > len(room) / 2 else ""
    yield (
        f"<b>Rank</b>: {average:.3g} of {nominal:.3g} directions are used on average, weighted by energy. In "
        f"{len(half) or 'none'} of {counted(len(room), 'module')} half of the rank or less holds 90 % of the "
        f"energy.{advice}"
    )


def _about_layers(m: Measured) -> Iterator[str]:
    """Layers whose size is far from the others', on a logarithmic scale, and types that differ."""
    energy: dict[int, list[float]] = {}
    for module, size in m.sizes.items():
        if (layer := address(module).layer) is not None and isfinite(size):
            energy.setdefault(layer, []).append(size**2)
    sizes = {layer: sqrt(sum(values) / len(values)) for layer, values in energy.items()}
    known = sorted(size for size in sizes.values() if size > 0)
    if len(known) < 5:
        return
    middle = median(known)
    spread = 1.4826 * median(abs(size / middle - 1) for size in known)
    odd = {layer: size for layer, size in sizes.items() if abs(size / middle - 1) > max(OUTLIER * spread, 0.1)}
    if not odd:
        low, high = min(sizes.values()), max(sizes.values())
        yield f"<b>Depth</b>: no layer stands out; the layers' sizes lie between {_size(m, low)} and {_size(m, high)}."
        return
    shown = ", ".join(
        f"layer {layer} ({size / middle:.2g} times the median)" for layer, size in sorted(odd.items())[:6]
    )
    more = f" and {len(odd) - 6} more" if len(odd) > 6 else ""
    yield f"<b>Depth</b>: {counted(len(odd), 'layer')} of {len(sizes)} stand out in size: {shown}{more}."


def _about_drift(m: Measured) -> Iterator[str]:
    if not m.drifts:
        return
    mean = sum(record.mean_drift for record in m.drifts.values()) / len(m.drifts)
    extremes = {
        module: max(record.norm_ratio.max - 1, record.norm_ratio.min - 1, key=abs)
        for module, record in m.drifts.items()
        if isfinite(record.norm_ratio.max)
    }
    if not extremes:
        return
    module = max(extremes, key=lambda name: abs(extremes[name]))
    vector = "row" if m.drifts[module].along == "out_features" else "column"
    yield (
        f"<b>Length</b>: a weight {vector} changes its length by {100 * mean:+.2g}\u00a0% on average; the "
        f"largest change of any is {100 * extremes[module]:+.3g}\u00a0%, in {monospace(module)}."
    )


def _about_intruders(m: Measured) -> Iterator[str]:
    if m.intruders:
        count = sum(record.count for record in m.intruders.values())
        asked = sum(record.k for record in m.intruders.values())
        yield f"<b>Intruders</b>: {count} of the {asked} leading singular vectors of W′ resemble none of the base's."


def _about_file(m: Measured) -> Iterator[str]:
    total, accounted = len(m.layout.header.tensors), len(list(m.layout.accounted()))
    replaced = f", {counted(len(m.layout.replacements), 'tensor')} replaced whole" if m.layout.replacements else ""
    rows = f", token rows in {len(m.layout.rows)}" if m.layout.rows else ""
    yield (
        f"<b>Coverage</b>: {counted(total, 'tensor')} in the file, {accounted} accounted for in "
        f"{counted(len(m.layout.adapters), 'adapted module')}{replaced}{rows}. What is replaced is not measured here."
        if replaced or rows
        else f"<b>Coverage</b>: {counted(total, 'tensor')} in the file, {accounted} accounted for in "
        f"{counted(len(m.layout.adapters), 'adapted module')}."
    )
    counts = Counter((p.severity, p.code, p.message) for p in m.layout.problems)
    for (severity, code, message), count in counts.items():
        times = f", {count} times" if count > 1 else ""
        yield f"<b>{safe(severity.capitalize())} {safe(code)}</b>: {safe(message)}{times}."


def _alike(measured: Sequence[Measured], alike: Alike) -> str:
    items = []
    for (i, j), whole in sorted(alike.items(), key=lambda item: -_or_zero(item[1].cosine)):
        names = f"<b>{safe(measured[i].label)}</b> and <b>{safe(measured[j].label)}</b>"
        if not whole.modules:
            items.append(f"<li>{names} have no module in common.</li>")
            continue
        items.append(
            f"<li>{names} are {whole.in_words()}: cosine {whole.cosine:z.3f} (unrelated adapters: "
            f"±{whole.cosine_null:.1g}) over {counted(whole.modules, 'module')}.{_same_start(whole)}</li>"
        )
    return f"<h3>To each other</h3><ul>{''.join(items)}</ul>"


def _or_zero(value: float) -> float:
    return value if value == value else 0.0


def _same_start(whole: Likeness) -> str:
    """Adapters that share their input directions alone started from one A; those that share both, trained alike."""
    inside, outside = whole.in_features, whole.out_features
    if not inside > 0.9:
        return ""
    if outside > 0.9:
        return " They share their input and their output directions, as adapters with a common training history do."
    return " They share their input directions but not their output ones, as when only the start of A is the same."


# Tables ---------------------------------------------------------------------------------------------------------------


def _facts(measured: Sequence[Measured]) -> str:
    heads = ["adapter", "kind", "modules", "rank", "scaling", "stored as", "file", "mean rank used", "‖delta‖F, total"]
    lines = [[text_cell(m.label, m.given), *map(text_cell, _file_facts(m)), *_size_facts(m)] for m in measured]
    if any(m.drifts for m in measured):
        heads.append("‖delta‖/‖W0‖, total")
    if measured[0].of != "delta":
        heads[-1] = heads[-1].replace("delta", measured[0].of)
    return table(heads, lines, words=7)


def _file_facts(m: Measured) -> list[str]:
    entries = m.layout.adapters.values()
    dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
    scalings = [entry.scaling for entry in entries if entry.scaling is not None]
    ranks = ["+".join(str(rank) for rank in entry.ranks.values()) for entry in entries]
    return [
        " and ".join(TABLE[kind].title for kind in m.layout.kinds),
        str(len(m.spectra)),
        ", ".join(dict.fromkeys(ranks)),
        ", ".join(dict.fromkeys(f"{scaling:.4g}" for scaling in scalings)),
        f"{m.layout.format}, {dtypes}",
        f"{m.nbytes / 1e6:.1f} MB",
    ]


def _size_facts(m: Measured) -> list[str]:
    used = [record.energy_entropy_rank for record in m.spectra.values()]
    total = sqrt(sum(record.frobenius_norm**2 for record in m.spectra.values()))
    cells = [number_cell(sum(used) / len(used)), number_cell(total)]
    if m.drifts:
        energy = sum(record.frobenius_norm**2 for record in m.drifts.values())
        base = sum(record.base_frobenius_norm**2 for record in m.drifts.values())
        cells.append(number_cell(sqrt(energy / base) if base else None, percent=True))
    return cells


def _module_table(measured: Sequence[Measured]) -> str:
    several, drifted = len(measured) > 1, any(m.drifts for m in measured)
    intruded = any(m.intruders for m in measured)
    heads = ["module", *(["adapter"] if several else []), "type", "kind", "layer"]
    heads += [MEASURES[name].word for name in SHOWN]
    heads += ["update", "mean drift", "least", "most", "1 − cos"] if drifted else []
    heads += ["intruders"] if intruded else []
    lines = []
    for m in measured:
        named = types(m.spectra)
        for module in m.spectra:
            words = [text_cell(module), *([text_cell(m.label)] if several else []), text_cell(named[module])]
            line = [*words, text_cell(TABLE[m.kinds[module]].title), *_spectrum_cells(m, module)]
            line += _drift_cells(m.drifts.get(module)) if drifted else []
            line += [number_cell(m.intruders[module].count if module in m.intruders else None)] if intruded else []
            lines.append(line)
    note = (
        "Press a heading to sort by it, again for the other direction. "
        + "; ".join(f"{MEASURES[name].word}: {MEASURES[name].formula}" for name in SHOWN if name != "spectral_norm")
        + ("; drift: change of a weight vector's length." if drifted else ".")
    )
    return f'<p class="soft">{safe(note)}</p>{table(heads, lines, words=4 if several else 3, sortable=True)}'


def _spectrum_cells(m: Measured, module: str) -> list[str]:
    record = m.spectra[module]
    numbers = [address(module).layer, m.nominal[module], *(getattr(record, name) for name in SHOWN[1:])]
    return [*map(number_cell, numbers)]


def _drift_cells(record: Drift | None) -> list[str]:
    if record is None:
        return [number_cell(None)] * 5
    ratio = record.norm_ratio
    shares = (record.relative_update, record.mean_drift, ratio.min - 1, ratio.max - 1)
    return [*(number_cell(share, percent=True) for share in shares), number_cell(record.delta_direction)]


# Figures --------------------------------------------------------------------------------------------------------------


def _trained(label: str, log: Log, figures: Figures) -> str:
    return f"<h2>How {safe(label)} was trained</h2>{figures.add(run_curves(log, label))}"


def _together(survey: Survey, alike: Alike, figures: Figures) -> str:
    labels = [m.label for m in survey.measured]
    parts = ["<h2>How alike the adapters are</h2>"]
    parts.append(figures.add(similarity_matrix(labels, alike)))
    by_depth, captions = [], []
    drawn = closest(alike, MOST_PAIRS)
    for i, j in drawn:
        names = (labels[i], labels[j])
        plot = similarity_by_depth(survey.shared[i, j], names)
        captions.append(f'<p class="soft">{safe(plot.caption)}</p>')
        by_depth.append(figures.add(plot, " and ".join(names), caption=False))
    if left := sum(map(bool, survey.shared.values())) - len(drawn):
        captions.append(f'<p class="soft">The {len(drawn)} most alike pairs; {left} more are in the matrix above.</p>')
    grid = f'<div class="grid">{"".join(by_depth)}</div>'
    return "".join([*parts, "<h3>Similarity against depth</h3>", *dict.fromkeys(captions), grid])


def _by_measure(measured: Sequence[Measured], figures: Figures) -> Iterator[str]:
    """A section per figure, the adapters side by side on one scale."""
    ranks = [rank for m in measured for rank in m.nominal.values() if rank is not None]
    used = [record.energy_entropy_rank for m in measured for record in m.spectra.values()]
    top = max([*ranks, *used], default=1.0)
    largest = max([record.rms_entry for m in measured for record in m.spectra.values()], default=0.0)
    moved = [m for m in measured if m.drifts]
    furthest = max([record.relative_update for m in moved for record in m.drifts.values()], default=0.0)
    probed = [m for m in measured if m.intruders]
    sections: list[tuple[Sequence[Measured], Callable[[Measured], Plot]]] = [
        (measured, lambda m: spectra.rank_map(m.spectra, m.nominal, top=top)),
        (measured, lambda m: spectra.rank_lines(m.spectra, m.nominal, top=top)),
        (measured, lambda m: spectra.spectrum_fan(m.spectra, m.nominal)),
        (moved, lambda m: drifts.relative_update_map(m.drifts, top=furthest)),
        (moved, lambda m: drifts.magnitude_direction(m.drifts)),
        (moved, lambda m: drifts.drift_by_depth(m.drifts)),
        (moved, lambda m: drifts.drift_distribution(m.drifts)),
        (probed, lambda m: spectra.intruder_profile(m.intruders)),
    ]
    if not moved:
        sections.insert(0, (measured, lambda m: spectra.size_map(m.spectra, top=largest)))
    for shown, draw in sections:
        titles, captions, inside = dict[str, None](), dict[str, None](), list[str]()
        for m in shown:  # one at a time: a figure takes a hundred times what is written of it
            plot = named(draw(m), m.label)
            titles[plot.title] = captions[plot.caption] = None
            inside.append(figures.add(plot, m.label if len(measured) > 1 else "", caption=False))
        if inside:
            said = "".join(f'<p class="soft">{safe(caption)}</p>' for caption in captions)
            yield f'<h2>{safe(next(iter(titles)))}</h2>{said}<div class="grid">{"".join(inside)}</div>'


def _files(measured: Sequence[Measured]) -> str:
    """Which files the numbers are of, by content."""
    lines = [
        [text_cell(m.label, m.given), text_cell(m.layout.path.name), text_cell(f"{m.nbytes:,}"),
         f'<td class="text"><code class="hash">{safe(m.sha256)}</code></td>']
        for m in measured
    ]  # fmt: skip
    return f"<h3>The files</h3>{table(['adapter', 'file', 'bytes', 'sha256'], lines, words=4)}"


def _method(measured: Sequence[Measured]) -> str:
    methods = sorted({record.method for m in measured for record in m.spectra.values()})
    explained = {
        "structural": "exactly from the factors, in float64",
        "exact": "from the float64 Gram matrix of the whole delta",
        "head-tail": "the leading values exactly, the rest as an estimate with a standard error",
    }
    how = "; ".join(f"{name}: {explained[name]}" for name in methods)
    return (
        f"<p>Spectra are of the {safe(measured[0].of)}, {safe(how)}. The delta is the effective weight minus the "
        "base weight, never the difference of rounded checkpoints. Rank used is the exponential of the entropy of "
        "σ²/Σσ²; other tools use the same words for other numbers, so the CSV beside each figure names the convention "
        "of every number. Grey marks and “chance” show what matrices without any relation would give.</p>"
    )
