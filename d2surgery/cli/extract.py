"""`d2surgery extract`: an adapter from a base and a model that was tuned from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2surgery.cli import measured, output, surgical
from d2surgery.cli.options import BASE_HELP, Base, progress_bar
from d2surgery.files.base import BaseWeights
from d2surgery.kinds import TABLE
from d2surgery.machine import give_back, uncollected

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.surgery.certificate import Certificate


@click.command(name="extract")
@click.option("--base", type=Base(), required=True, help=f"{BASE_HELP}.")
@click.option("--tuned", type=Base(), required=True, help="The model that was tuned from it, or merged.")
@click.option("--out", type=surgical.DIRECTORY, required=True, help="Directory to be made.")
@click.option("--kind", type=click.Choice(list(TABLE)), default="lora", show_default=True, help="In which form.")
@surgical.keep_options
@measured.output_options
def command(base: Path, tuned: Path, out: Path, kind: str, **options: Any) -> int:
    """The adapter that makes TUNED of BASE, as nearly as its rank allows.

    Without --rank or a criterion each weight gets as many ranks as stand above the rounding of the tuned file. Norms,
    biases and new tensors are stored whole; what is the same is skipped, and what no adapter can hold is named. The
    form of a DoRA also un-merges one.
    """
    keep, outputs = surgical.chosen(out, options)
    give_back(1 << 22)
    models = BaseWeights(base), BaseWeights(tuned)
    with uncollected():  # torch
        from d2surgery.surgery.extracting import extract

    with progress_bar("extracting", show=outputs.show_progress, unit=" tensors") as progress:
        made, certificate = extract(*models, kind, keep=keep, progress=progress)
    surgical.write(made, out)
    surgical.show(made, certificate, out, outputs)
    if outputs.show_progress:
        for line in _beside(made, certificate):
            output.emit(line)
    return 0


def _beside(made: "Checkpoint", certificate: "Certificate") -> Iterator[str]:
    settings = certificate.settings
    if certificate.losses and not certificate.exact:
        share = measured.percent(settings["rounding"])
        yield f"  rounding  the tuned file's own may be {share} of this change; an error below that says nothing"
    whole, rows = len(made.layout.replacements), len(made.layout.rows)
    if whole or rows:
        yield f"  whole  {output.count(whole, 'tensor')}" + (f", some rows of {rows} more" if rows else "")
    for name, why in settings["left_out"].items():
        yield f"  left out  {output.printable(name)}: {why}"
    if settings["left_out"]:
        yield f"  that is {measured.percent(settings['left_out_share'])} of all that changed"
