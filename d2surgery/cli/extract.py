"""`d2surgery extract`: an adapter from a base and a model that was tuned from it."""

from pathlib import Path
from typing import Literal

import click

from d2surgery.cli import measured, output, surgical
from d2surgery.cli.options import BASE_HELP, Base, progress_bar
from d2surgery.files.base import BaseWeights
from d2surgery.surgery.extracting import extract


@click.command(name="extract")
@click.option("--base", type=Base(), required=True, help=f"{BASE_HELP}.")
@click.option("--tuned", type=Base(), required=True, help="The model that was tuned from it, or merged.")
@click.option("--out", type=surgical.DIRECTORY, required=True, help="Directory to be made.")
@click.option("--kind", type=click.Choice(["lora", "dora"]), default="lora", show_default=True, help="In which form.")
@surgical.keep_options
@surgical.result_options
def command(
    base: Path,
    tuned: Path,
    out: Path,
    kind: Literal["lora", "dora"],
    rank: int | None,
    per_layer: bool,
    as_json: bool,
    quiet: bool,
    **criteria: float | None,
) -> int:
    """The adapter that makes TUNED of BASE, as nearly as its rank allows.

    Without --rank or a criterion each weight gets as many ranks as stand above the rounding of the tuned file. Norms,
    biases and new tensors are stored whole; what is the same is skipped, and what no adapter can hold is named. The
    form of a DoRA also un-merges one.
    """
    surgical.require_new(out)
    keep = surgical.keep_of(rank, criteria)
    with progress_bar("extracting", show=not (as_json or quiet), unit=" tensors") as progress:
        made, certificate = extract(BaseWeights(base), BaseWeights(tuned), kind, keep=keep, progress=progress)
    surgical.write(made, out)
    surgical.show(made, certificate, out, per_layer=per_layer, as_json=as_json, quiet=quiet)
    if not (as_json or quiet):
        whole, rows = len(made.layout.replacements), len(made.layout.rows)
        if whole or rows:
            output.emit(f"  whole  {output.count(whole, 'tensor')}, rows of {rows} more")
        left = certificate.settings["left_out"]
        for name, why in left.items():
            output.emit(f"  left out  {output.printable(name)}: {why}")
        if left:
            output.emit(f"  that is {measured.percent(certificate.settings['left_out_share'])} of all that changed")
    return 0
