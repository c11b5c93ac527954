"""`d2surgery combine`: several adapters as one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from d2surgery.cli import measured, output, surgical
from d2surgery.cli.options import BASE_HELP, Base, Weighted, progress_bar
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.machine import uncollected
from d2surgery.surgery.choices import ALL, METHODS, Recipe, Space

if TYPE_CHECKING:
    from d2surgery.surgery.sharing import Sharing


@click.command(name="combine")
@click.argument("adapters", nargs=-1, required=True, type=Weighted(), metavar="ADAPTER[:WEIGHT]...")
@click.option("--out", type=surgical.DIRECTORY, help="Directory to be made.")
@click.option("--method", type=click.Choice(METHODS), default="exact", show_default=True, help="How; see below.")
@click.option("--space", type=click.Choice(get_args(Space)), default="entries", show_default=True,
              help="Where ties, dare, della and magnitude choose.")  # fmt: skip
@click.option("--density", type=float, default=0.5, show_default=True, help="The share of entries that these keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of dare and della.")
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it.")
@click.option("--plan", is_flag=True, help="Say what they share and what a sum would lose; write nothing.")
@click.option("--audit", "combined", help="Is this adapter what its header says it is made of? The parts in its order.")
@surgical.keep_options
@measured.output_options
def command(
    adapters: tuple[tuple[str, float], ...],
    out: Path | None,
    base: Path | None,
    plan: bool,
    combined: str | None,
    **options: Any,
) -> int:
    """The weighted sum of adapters as one LoRA; a weight is 1 where none is given, and may be negative.

    exact: the sum itself. svd: its best approximation of --rank, else of the sum of the ranks. slerp: between two,
    along the arc. ties, dare, della, magnitude: a part of the entries of each. tsv, iso-c: chosen or evened directions.
    Of DoRA and D2-LoRA the deltas are summed, which no DoRA can do exactly: give --base, and svd or a --rank.
    """
    if sum((out is not None, plan, combined is not None)) != 1:
        raise refuse("USAGE", "where to", wanted="--out, --plan or --audit", got="none or several of them")
    how = {name: options.pop(name) for name in ("method", "space", "density", "seed")}
    keep, outputs = surgical.chosen(out, options)
    recipe = Recipe(keep=keep, **how)
    names, weights = zip(*adapters, strict=True)
    opened = measured if plan else surgical
    layouts = [opened.open_adapter(name) for name in (*names, *filter(None, [combined]))]
    where = BaseWeights(base) if base is not None else None
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surgery.algebra import audit_combination, combine
        from d2surgery.surgery.sharing import sharing

    checkpoints = [Checkpoint(layout) for layout in layouts]
    with progress_bar("combining", show=outputs.show_progress, unit=" modules") as progress:
        if plan:
            shared = sharing(checkpoints, weights, None if keep is ALL else keep, progress=progress)
            measured.show(outputs, _document(names, weights, shared), _text(names, shared), list)
            return 0
        if combined is not None:
            made = checkpoints.pop()
            certificate, problems = audit_combination(made, checkpoints, where, progress=progress)
            verdict = "fail" if problems else "pass"
            surgical.show(
                made, certificate, None, outputs, verdict=verdict, problems=list(map(output.record, problems))
            )
            for line in output.problem_lines(problems) if outputs.show_progress else ():
                output.emit(line)
            return int(bool(problems))
        made, certificate = combine(checkpoints, weights, recipe, where, progress=progress)
    assert out is not None
    surgical.write(made, out)
    surgical.show(made, certificate, out, outputs)
    return 0


# A plan ---------------------------------------------------------------------------------------------------------------


def _document(names: Sequence[str], weights: Sequence[float], shared: "Sharing") -> dict[str, Any]:
    pairs = [{"first": names[i], "second": names[j]} | each._asdict() for (i, j), each in shared.pairs.items()]
    return {
        "adapters": list(names),
        "weights": list(weights),
        "pairs": pairs,
        "kept": list(shared.kept),
        "energy": shared.energy,
        "error": shared.error,
        "in_words": shared.in_words(),
    }


def _text(names: Sequence[str], shared: "Sharing") -> Iterator[str]:
    yield from output.prose(f"{output.count(len(names), 'adapter')}: {shared.in_words()}.")
    rows = [
        ["", "left in the sum"],
        *([name, measured.percent(kept)] for name, kept in zip(names, shared.kept, strict=True)),
    ]
    yield from output.table(rows)
    rows = [["", "", "cosine", "by chance", "φ in", "φ out", "signs disagree"]]
    for (i, j), each in shared.pairs.items():
        numbers = (
            f"{each.cosine:z.3f}",
            f"±{each.cosine_null:.1g}",
            f"{each.in_features:.3f}",
            f"{each.out_features:.3f}",
        )
        rows.append([names[i], names[j], *numbers, measured.percent(1 - each.signs)])
    yield from output.table(rows) if shared.pairs else ()
    yield f"  the sum has {measured.percent(shared.energy)} of the energy that they have apart"
    if shared.error is not None:
        yield f"  cut to the ranks asked for it would lose {measured.percent(shared.error)}"
    yield from output.prose(
        "left in the sum: of each, what the weighted sum has along it. φ in, φ out: share of one's input or output "
        "directions that the other uses too. ties drops the lighter side where signs disagree."
    )
