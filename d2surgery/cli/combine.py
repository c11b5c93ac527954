"""`d2surgery combine`: several adapters as one."""

from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import click

from d2surgery.checkpoint import Checkpoint
from d2surgery.cli import measured, output, surgical
from d2surgery.cli.options import BASE_HELP, Base, progress_bar
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.plain import plain
from d2surgery.surgery.algebra import combine
from d2surgery.surgery.combining import METHODS, Recipe, Space
from d2surgery.surveying.modules import differences


@click.command(name="combine")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("--out", type=surgical.DIRECTORY, help="Directory to be made.")
@click.option("--method", type=click.Choice(METHODS), default="exact", show_default=True, help="How; see below.")
@click.option("--space", type=click.Choice(get_args(Space)), default="entries", show_default=True,
              help="Where ties, dare, della and magnitude choose.")  # fmt: skip
@click.option("--density", type=float, default=0.5, show_default=True, help="The share of entries that these keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of dare and della.")
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what they share and what would be lost; write nothing.")
@surgical.keep_options
@surgical.result_options
def command(
    adapters: tuple[str, ...],
    out: Path | None,
    method: str,
    space: Space,
    density: float,
    seed: int,
    base: Path | None,
    only_plan: bool,
    rank: int | None,
    per_layer: bool,
    as_json: bool,
    quiet: bool,
    **criteria: float | None,
) -> int:
    """The weighted sum of adapters as one LoRA; a weight is 1 where none is given, and may be negative.

    exact: the sum itself. svd: its best approximation of --rank. slerp: between two, along the arc. ties, dare, della,
    magnitude: a part of the entries of each. tsv, iso-c: chosen or evened directions. Of DoRA and D2-LoRA the deltas
    are summed, which no DoRA can do exactly: give --base, and a --rank.
    """
    if (out is None) != only_plan:
        raise refuse("USAGE", "where to", wanted="--out, or --plan", got="both" if out else "neither")
    if out is not None:
        surgical.require_new(out)
    names, weights = zip(*map(_weighted, adapters), strict=True)
    checkpoints = [measured.open_adapter(name) for name in names]
    keep = surgical.keep_of(rank, criteria)
    recipe = Recipe(method=method, keep=keep, density=density, space=space, seed=seed)  # type: ignore[arg-type]
    with progress_bar("combining", show=not (as_json or quiet), unit=" modules") as progress:
        made, certificate = combine(
            checkpoints, weights, recipe, BaseWeights(base) if base is not None else None, progress=progress
        )
    pairs = _pairs(names, checkpoints)
    if out is not None:
        surgical.write(made, out)
    where = out if out is not None else Path("not written")
    surgical.show(made, certificate, where, per_layer=per_layer, as_json=as_json, quiet=quiet, pairs=plain(pairs))
    if not (as_json or quiet):
        for pair in pairs:
            output.emit(
                f"  {output.printable(str(pair['first']))} and {output.printable(str(pair['second']))}: cosine "
                f"{pair['cosine']:.3f}, signs agree in {measured.percent(pair['signs_agree'])}"
            )
    return 0


def _weighted(text: str) -> tuple[str, float]:
    """ADAPTER or ADAPTER:WEIGHT; a colon that is part of a path stays one."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon and name and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def _pairs(names: tuple[str, ...], checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    """What each two have in common, over the modules that both adapt: before weights, of their updates."""
    found: list[dict[str, Any]] = []
    for i, j in combinations(range(len(names)), 2):
        modules = [each for _, each in differences(checkpoints[i], checkpoints[j])]
        if not modules:
            continue
        inner = sum(each.cosine.value * each.norms[0] * each.norms[1] for each in modules)
        sizes = [sum(each.norms[k] ** 2 for each in modules) ** 0.5 for k in (0, 1)]
        agree = sum(each.signs.share * each.shape[0] * each.shape[1] for each in modules)
        entries = sum(each.shape[0] * each.shape[1] for each in modules)
        found.append({
            "first": names[i],
            "second": names[j],
            "modules": len(modules),
            "cosine": inner / (sizes[0] * sizes[1]) if all(sizes) else 0.0,
            "signs_agree": agree / entries,
        })  # fmt: skip
    return found
