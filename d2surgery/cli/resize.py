"""`d2surgery resize`: an adapter of fewer ranks, with the error that this makes."""

from pathlib import Path
from typing import Any

import click

from d2surgery.cli import measured, surgical
from d2surgery.cli.options import BASE_HELP, Adapter, Base, Bytes, Number, progress_bar
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.machine import uncollected
from d2surgery.surgery.choices import ALL


@click.command(name="resize")
@click.argument("adapter", type=Adapter())
@click.argument("out", type=surgical.DIRECTORY)
@click.option(
    "--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it, and --budget is then relative to it."
)
@surgical.keep_options
@click.option("--above-base", type=Number(), help="Keep directions whose σ is above this share of ‖W0‖F; with --base.")
@click.option("--budget", type=Bytes(), help="Bytes in float32 for all ranks together, spread over the modules.")
@click.option("--compat", type=click.Choice(["kohya"]), help="Keep one rank more than the criterion, as kohya does.")
@surgical.calibration_options
@measured.output_options
def command(
    adapter: str,
    out: Path,
    base: Path | None,
    above_base: float | None,
    budget: int | None,
    max_error: float | None,
    calibration: Path | None,
    **options: Any,
) -> int:
    """ADAPTER of fewer ranks in the directory OUT, of its own kind, with the error that this makes.

    One rank for all (--rank), the fewest by a criterion, or as many as fit into --budget, each where it takes most
    error per byte: with --base relative to the base's weights. Of DoRA the magnitudes are solved for again.
    """
    keep, outputs = surgical.chosen(out, options)
    wishes = {"--budget": budget, "--above-base": above_base, "a rank or a criterion": None if keep is ALL else keep}
    given = [name for name, value in wishes.items() if value is not None]
    if len(given) > 1 or not (given or max_error is not None):
        wanted = "--rank, a criterion, --above-base, --budget or --max-error"
        raise refuse("USAGE", "how many ranks", wanted=wanted, got=" and ".join(given) or "none of these")
    if above_base is not None and base is None:
        raise refuse("USAGE", "--above-base measures by the base", wanted="--base", got="none")
    surgical.check_calibration(base, calibration)
    layout = surgical.open_adapter(adapter)
    weights = BaseWeights(base) if base is not None else None
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surgery.resizing import against_base, resize
        from d2surgery.surgery.resizing import budget as spread

    checkpoint = Checkpoint(layout)
    ranks = (
        spread(checkpoint, budget // 4, weights) if budget is not None
        else against_base(checkpoint, above_base, weights) if above_base is not None and weights is not None
        else keep
    )  # fmt: skip
    moments = surgical.weights_of(base, calibration, checkpoint, outputs)
    with progress_bar("resizing", show=outputs.show_progress, unit=" modules") as progress:
        made, certificate = resize(
            checkpoint, weights, keep=ranks, max_error=max_error, weights=moments, progress=progress
        )
    beside = surgical.write(made, out, checkpoint)
    surgical.show(made, certificate, out, outputs, tokenizer=beside)
    return 0
