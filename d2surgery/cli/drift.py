"""`d2surgery drift`: how far each module moves the length and the direction of the base's vectors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from d2surgery.cli import measured, output
from d2surgery.cli.options import BASE_HELP, Adapter, Base, device_option, progress_bar
from d2surgery.files.base import BaseWeights
from d2surgery.kinds import Axis
from d2surgery.machine import give_back, uncollected
from d2surgery.reporting.tidy import QUANTILES, drift_rows, quantiles

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.measures.drift import Correlation, Drift
    from d2surgery.reporting.figures.parts import Plot

Found = Mapping[str, "Drift"]


@click.command(name="drift")
@click.argument("adapter", type=Adapter())
@click.option("--base", type=Base(), required=True, help=f"{BASE_HELP}.")
@click.option("--along", type=click.Choice(get_args(Axis)), help="The axis that is kept. Default: the adapter's own.")
@device_option
@measured.output_options
def command(adapter: str, base: Path, along: Axis | None, device: str, **options: Any) -> int:
    """Norm ratios, directional change and relative size of each module's delta, vector by vector.

    --along out_features: a vector is a row of the (out, in) weight; in_features: a column. Without it DoRA and D2-LoRA
    use the axis they normalise along, the others out_features.
    """
    give_back()
    outputs = measured.checked_outputs(**options)
    weights = BaseWeights(base, dequantized=True)
    layout = measured.open_adapter(adapter, weights)
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.measures.drift import correlation
        from d2surgery.surveying.adapter import labels
        from d2surgery.surveying.modules import drifts

    checkpoint = Checkpoint(layout)
    with progress_bar("measuring", show=outputs.show_progress, unit=" modules") as progress:
        found = dict(drifts(checkpoint, weights, along=along, device=device, progress=progress))
    related = correlation(list(found.values()))

    (label,) = labels([adapter])
    measured.show(
        outputs,
        _document(checkpoint, base, found, related),
        _text(checkpoint, found, related, outputs.per_layer),
        lambda: drift_rows(found, adapter),
    )
    measured.draw(outputs, lambda: _figures(found, label), f"Drift of {label}")
    return 0


def _figures(found: Found, label: str) -> list["Plot"]:
    from d2surgery.reporting.figures import drifts as figures  # plotly, and only where figures are drawn
    from d2surgery.reporting.figures import parts

    plots = [
        figures.drift_by_depth(found),
        figures.drift_distribution(found),
        figures.magnitude_direction(found),
        figures.relative_update_map(found),
    ]
    return [parts.named(plot, label) for plot in plots]


def _document(checkpoint: "Checkpoint", base: Path, found: Found, related: "Correlation") -> dict[str, Any]:
    return {
        "path": str(checkpoint.layout.path),
        "base": str(base),
        "kinds": checkpoint.layout.kinds,
        "modules": [{"module": module} | _record(record) for module, record in found.items()],
        "correlation": vars(related),
    }


def _record(record: "Drift") -> dict[str, Any]:
    names = ("mean_drift", "delta_magnitude", "delta_direction", "relative_update", "frobenius_norm", "undefined")
    return {
        "along": record.along,
        "norm_ratio": record.norm_ratio,
        "cosine": {"mean": record.cosine_mean, "min": record.cosine_min},
        **{name: getattr(record, name) for name in names},
        "base_frobenius_norm": record.base_frobenius_norm,
        "drift_quantiles": dict(zip(QUANTILES, quantiles(record.drift), strict=True)),
    }


def _text(checkpoint: "Checkpoint", found: Found, related: "Correlation", per_layer: bool) -> Iterator[str]:
    yield from output.prose(_verdict(checkpoint, found))
    yield ""
    rows = [["", "update", "drift", "least", "most", "1 − cos"]]
    for name, modules in measured.groups(found, per_layer).items():
        rows.append([name, *_numbers([found[module] for module in modules])])
    yield from output.table(rows)
    yield ""
    yield from output.prose(
        "update: ‖delta‖/‖W0‖. drift: mean change of a vector's length, ‖w′‖/‖w‖ − 1; least and most: of any vector. "
        f"1 − cos: mean change of direction.{'' if per_layer else ' Means over a line.'}"
    )
    yield from _correlation(related)
    yield from output.prose(_coverage(found))


def _verdict(checkpoint: "Checkpoint", found: Found) -> str:
    size = measured.mean(record.relative_update for record in found.values())
    largest = max(found, key=lambda module: found[module].relative_update)
    most = measured.percent(measured.mean([found[largest].relative_update]))
    return (
        f"{measured.kinds(checkpoint)} on {output.count(len(checkpoint), 'module')}: moves the base by "
        f"{measured.percent(size)} on average, {output.printable(largest)} most ({most})."
    )


def _numbers(records: "list[Drift]") -> list[str]:
    lows, highs = ([r.norm_ratio.min - 1 for r in records], [r.norm_ratio.max - 1 for r in records])
    return [
        measured.percent(measured.mean(r.relative_update for r in records)),
        measured.percent(measured.mean(r.mean_drift for r in records), "+"),
        measured.percent(min(lows), "+"),
        measured.percent(max(highs), "+"),
        f"{measured.mean(r.delta_direction for r in records) or 0:.2g}",
    ]


def _correlation(related: "Correlation") -> Iterator[str]:
    if related.pearson == related.pearson:
        yield from output.prose(
            f"ΔM against ΔD over {related.modules} modules: Pearson {related.pearson:+.2f}; random updates of the same "
            f"sizes give {related.null_mean:+.2f} ± {related.null_sd:.2f}."
        )


def _coverage(found: Found) -> str:
    axes = " and ".join(sorted({record.along for record in found.values()}))
    vectors = sum(len(record.base_norms) for record in found.values())
    zero = sum(record.undefined for record in found.values())
    return f"{output.count(len(found), 'module')}, {vectors} vectors along {axes}, {zero} of length zero in the base"
