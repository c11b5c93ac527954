"""`d2surgery convert`: an adapter as another kind or in another format, with the error that this makes."""

from pathlib import Path
from typing import Any

import click

from d2surgery.cli import formats, measured, surgical
from d2surgery.cli.options import BASE_HELP, Adapter, Base, Engine, Number, progress_bar, scaling_options
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.formats.engines import ENGINES
from d2surgery.kinds import TABLE, Axis
from d2surgery.machine import uncollected
from d2surgery.surgery.choices import ALL


@click.command(name="convert")
@click.argument("adapter", type=Adapter())
@click.argument("out", type=surgical.DIRECTORY)
@click.option("--kind", type=click.Choice(list(TABLE)), help="The kind to make; with --rescale-base it is lora.")
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it.")
@surgical.keep_options
@surgical.calibration_options
@click.option("--along", type=click.Choice(["out_features", "in_features"]), help="The axis of DoRA or D2-LoRA.")
@click.option("--tau", type=Number(), help="D2-LoRA's τ. Default: the adapter's, else 0.5.")
@click.option("--rescale-base", type=surgical.DIRECTORY, help="Write a rescaled base here: LoRA is then exact.")
@click.option("--to", "form", type=click.Choice(formats.WRITTEN), help="The format to write, read back and compared.")
@click.option("--for", "engine", type=Engine(), help="The format that this engine takes.")
@scaling_options
@measured.output_options
def command(
    adapter: str,
    out: Path,
    kind: str | None,
    base: Path | None,
    max_error: float | None,
    calibration: Path | None,
    along: Axis | None,
    tau: float | None,
    rescale_base: Path | None,
    form: str | None,
    engine: str | None,
    scale: float | None,
    alpha: float | None,
    **options: Any,
) -> int:
    """ADAPTER as another kind or in another format in the directory OUT, with the error that this makes.

    LoRA to DoRA is exact, and so is D2-LoRA to DoRA on its axis. Others are the nearest that the rank allows: the
    error is of the whole delta, measured on what is written, by module. With --rescale-base DoRA and D2-LoRA become
    a plain LoRA exactly, on the base that this writes.

    With --to or --for and no --kind, the same adapter in another format: what it has no place for is refused.
    """
    keep, outputs = surgical.chosen(out, options)
    if engine is not None:
        if form not in (None, ENGINES[engine].takes):
            raise refuse("USAGE", f"--for {engine} writes {ENGINES[engine].takes}", got=f"--to {form}")
        form = ENGINES[engine].takes
    asked = [value for value in (kind, rescale_base, max_error, calibration, along, tau) if value is not None]
    only_format = not asked and keep is ALL and outputs.plot is None
    if kind is None and rescale_base is None and form is None:
        raise refuse("USAGE", "which kind", wanted="--kind; `d2surgery resize` keeps it", got="none")
    if rescale_base is not None and (kind not in (None, "lora") or base is None):
        raise refuse("USAGE", "--rescale-base makes a LoRA", wanted="--base, and no other --kind", got=str(kind))
    surgical.check_calibration(base, calibration)
    weights = BaseWeights(base) if base is not None else None
    layout = (measured if form and only_format else surgical).open_adapter(adapter, weights, scale=scale, alpha=alpha)
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surgery.rescaling import rescale
        from d2surgery.surgery.resizing import convert

    checkpoint = Checkpoint(layout)
    if form and only_format:
        formats.rewrite(checkpoint, out, form, outputs)
        return 0
    if rescale_base is not None and weights is not None:
        made, certificate = rescale(checkpoint, weights, rescale_base)
    else:
        moments = surgical.weights_of(base, calibration, checkpoint, outputs)
        with progress_bar("converting", show=outputs.show_progress, unit=" modules") as progress:
            made, certificate = convert(
                checkpoint, kind, weights, keep=keep, max_error=max_error, along=along, tau=tau, weights=moments,
                progress=progress,
            )  # fmt: skip
    beside = surgical.write(made, out, checkpoint, form or "peft")
    rescaled = None if rescale_base is None else str(rescale_base)
    surgical.show(made, certificate, out, outputs, tokenizer=beside, rescaled_base=rescaled)
    return 0
