"""`d2surgery spectrum`: how much of its rank each module uses."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from d2surgery.cli import measured, output
from d2surgery.cli.options import BASE_HELP, Adapter, Base, cache_option, device_option, progress_bar, scaling_options
from d2surgery.files.base import BaseWeights
from d2surgery.machine import give_back, uncollected
from d2surgery.measures.table import MEASURES, NUMBERS, Method, Of
from d2surgery.reporting.tidy import CONVENTIONS, singular_value_rows, spectrum_rows

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.measures.ranks import Spectrum
    from d2surgery.reporting.figures.parts import Plot

Found = Mapping[str, "Spectrum"]
SHOWN = ("energy_entropy_rank", "stable_rank", "energy_rank_90", "energy_rank_99", "frobenius_norm", "rms_entry")


@click.command(name="spectrum")
@click.argument("adapter", type=Adapter())
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA's and D2-LoRA's delta needs it.")
@click.option("--of", type=click.Choice(get_args(Of)), help="What to measure. Default: the delta where it is known.")
@click.option("--method", type=click.Choice(get_args(Method)), help="Default: by kind and size.")
@device_option
@cache_option
@scaling_options
@measured.output_options
def command(
    adapter: str,
    base: Path | None,
    of: Of | None,
    method: Method | None,
    device: str,
    cache: Path | None,
    scale: float | None,
    alpha: float | None,
    **options: Any,
) -> int:
    """Singular values, norms and every rank of each module's update or delta.

    The update is scaling times B times A, before any normalisation; the delta is the effective weight minus the base.
    Of a LoRA they are the same, and exact from the factors in a moment. DoRA's and D2-LoRA's delta needs --base.
    """
    give_back()
    outputs = measured.checked_outputs(**options)
    weights = BaseWeights(base) if base is not None else None
    layout = measured.open_adapter(adapter, weights, scale=scale, alpha=alpha, up_to_scale=True)
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surveying.adapter import labels, nominal_ranks
        from d2surgery.surveying.modules import spectra

    checkpoint = Checkpoint(layout)
    with progress_bar("measuring", show=outputs.show_progress, unit=" modules") as progress:
        found = dict(spectra(checkpoint, weights, of=of, method=method, device=device, cache=cache, progress=progress))
    nominal = nominal_ranks(checkpoint)

    def rows() -> list[Any]:
        return [*spectrum_rows(found, nominal, adapter), *singular_value_rows(found, adapter)]

    (label,) = labels([adapter])
    told = _document(checkpoint, base, found)
    measured.show(outputs, told, _text(checkpoint, found, nominal, told["zero_updates"], outputs.per_layer), rows)
    measured.draw(outputs, lambda: _figures(found, nominal, label), f"Spectra of {label}")
    return 0


def _figures(found: Found, nominal: Mapping[str, int | None], label: str) -> list["Plot"]:
    from d2surgery.reporting.figures import parts  # plotly, and only where figures are drawn
    from d2surgery.reporting.figures import spectra as figures

    plots = [
        figures.rank_map(found, nominal),
        figures.rank_lines(found, nominal),
        figures.spectrum_fan(found, nominal),
        figures.size_map(found),
    ]
    return [parts.named(plot, label) for plot in plots]


def _document(checkpoint: "Checkpoint", base: Path | None, found: Found) -> dict[str, Any]:
    from d2surgery.surveying.modules import places
    from d2surgery.surveying.zeros import zero_updates

    entries = {place.name: checkpoint.layout.adapters[place.module] for place in places(checkpoint)}
    return {
        "path": str(checkpoint.layout.path),
        "base": None if base is None else str(base),
        "kinds": checkpoint.layout.kinds,
        "up_to_scale": any(problem.code == "SCALING_UNKNOWN" for problem in checkpoint.layout.problems),
        "zero_updates": zero_updates(checkpoint),
        "modules": [
            {"module": module, "kind": entries[module].kind, "rank": entries[module].rank} | _record(record)
            for module, record in found.items()
        ],
    }


def _record(record: "Spectrum") -> dict[str, Any]:
    names = (
        "of",
        "method",
        "singular_values",
        "numerical_rank",
        *NUMBERS,
        "rms_entry",
        "nuclear_norm_bound",
        "error_bound",
        "shape",
    )
    told = {name: getattr(record, name) for name in (*names, "cancellation")}
    return told | {"standard_errors": dict(record.standard_errors), "quality": dict(record.quality)}


def _text(
    checkpoint: "Checkpoint", found: Found, nominal: Mapping[str, int | None], zeros: list[str], per_layer: bool
) -> Iterator[str]:
    from d2surgery.surveying.zeros import problems_of_zeros

    yield from output.prose(f"{_verdict(checkpoint, found, nominal)}")
    unknown = [problem for problem in checkpoint.layout.problems if problem.code == "SCALING_UNKNOWN"]
    yield from output.problem_lines([*unknown, *problems_of_zeros(checkpoint.layout, zeros)])
    yield ""
    rows = [["", *(MEASURES[name].word for name in ("nominal_rank", *SHOWN))]]
    for name, modules in measured.groups(found, per_layer).items():
        rows.append([name, _span([nominal.get(module) for module in modules]), *_means([found[m] for m in modules])])
    yield from output.table(rows)
    yield ""
    note = "" if per_layer else " Means over a line."
    yield from output.prose(
        f"rank: {CONVENTIONS['nominal_rank']}. rank used: {CONVENTIONS['energy_entropy_rank']}. stable: σ-energy over "
        f"that of the first, {CONVENTIONS['stable_rank']}. k90, k99: directions that hold 90, 99 % of Σσ². RMS: "
        f"{CONVENTIONS['rms_entry']}.{note}"
    )
    yield from output.prose(_coverage(found))


def _verdict(checkpoint: "Checkpoint", found: Found, nominal: Mapping[str, int | None]) -> str:
    used = measured.mean(record.energy_entropy_rank for record in found.values())
    room = measured.mean(nominal[module] for module in found)
    of = " and ".join(sorted({record.of for record in found.values()}))
    share = f"{output.number(used)} of {room:.3g}" if of == "update" or room else output.number(used)
    if room and used and used > room:  # a dense delta has more directions than its update has room for
        share = f"{output.number(used)} (the update alone has room for {room:.3g})"
    return (
        f"{measured.kinds(checkpoint)} on {output.count(len(checkpoint), 'module')}: the {of} uses {share} "
        "directions on average, weighted by energy."
    )


def _span(ranks: list[int | None]) -> str:
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return "–"
    return str(known[0]) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _means(records: "list[Spectrum]") -> list[str]:
    return [f"{measured.mean([getattr(r, name) for r in records]) or 0:.3g}" for name in SHOWN]


def _coverage(found: Found) -> str:
    methods = sorted({record.method for record in found.values()})
    counts = ", ".join(f"{sum(r.method == m for r in found.values())} {m}" for m in methods)
    estimate = "; head-tail numbers are estimates, --json has standard errors" if "head-tail" in methods else ""
    return f"{output.count(len(found), 'module')} measured: {counts}{estimate}"
