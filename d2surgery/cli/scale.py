"""`d2surgery scale`: an adapter stronger, weaker, negated, or a part of it."""

import re
from pathlib import Path
from typing import Any

import click

from d2surgery.cli import measured, surgical
from d2surgery.cli.options import BASE_HELP, Adapter, Base, Number, progress_bar
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.machine import uncollected


@click.command(name="scale", context_settings={"ignore_unknown_options": True})
@click.argument("adapter", type=Adapter())
@click.argument("factor", type=Number())
@click.option("--out", type=surgical.DIRECTORY, required=True, help="Directory to be made.")
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it.")
@click.option("--modules", help="Only modules in whose name this regular expression is found.")
@click.option("--layers", help="Only these layers, such as 0-11.")
@click.option("--only", is_flag=True, help="Leave the other modules out; else they stay as they are.")
@measured.output_options
def command(
    adapter: str,
    factor: float,
    out: Path,
    base: Path | None,
    modules: str | None,
    layers: str | None,
    only: bool,
    **options: Any,
) -> int:
    """ADAPTER with its delta times FACTOR: -1 takes back what it does, 1 with --only is a part of it.

    LoRA and Dual LoRA by their scaling. DoRA and D2-LoRA become the DoRA whose delta this is; they need --base. What
    the file replaces whole goes the same way from the base's values to its own, and needs --base too.
    """
    surgical.require_new(out)
    outputs = measured.checked_outputs(**options)
    within = _layers(layers)
    layout = surgical.open_adapter(adapter)
    weights = BaseWeights(base) if base is not None else None
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surgery.algebra import choose, scale

    checkpoint = Checkpoint(layout)
    chosen = choose(checkpoint, modules, within) if modules is not None or layers is not None else None
    with progress_bar("scaling", show=outputs.show_progress, unit=" modules") as progress:
        made, certificate = scale(checkpoint, factor, weights, chosen=chosen, only=only, progress=progress)
    beside = surgical.write(made, out, checkpoint)
    surgical.show(made, certificate, out, outputs, tokenizer=beside)
    return 0


def _layers(text: str | None) -> range | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise refuse("USAGE", "--layers", wanted="a number or a range such as 0-11", got=text)
    return range(int(found[1]), int(found[2] or found[1]) + 1)
