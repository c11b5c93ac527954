"""`d2surgery diff`: what adapters have in common, module by module, beside what unrelated ones would give."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from d2surgery.cli import measured, output
from d2surgery.cli.options import Adapter, exact_signs_option, progress_bar
from d2surgery.errors import refuse
from d2surgery.machine import give_back, uncollected
from d2surgery.reporting.tidy import Row, difference_rows

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.measures.likeness import Difference, Likeness, Shared
    from d2surgery.reporting.figures.parts import Plot


class Compared(NamedTuple):
    first: str
    second: str
    modules: "Mapping[str, Difference]"
    only_first: list[str]
    only_second: list[str]
    whole: "Likeness"


@click.command(name="diff")
@click.argument("adapters", type=Adapter(), nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@exact_signs_option
@measured.output_options
def command(adapters: tuple[str, ...], exact_signs: bool, **options: Any) -> int:
    """Cosines, shared subspaces with their principal angles, and sign agreement of every pair of adapters.

    Of the updates, from their factors; of Dual LoRA's deltas, which have no factors, without the subspaces. Beside
    each number stands what two unrelated adapters would give. The signs of large modules are a sample's, with its
    standard error; all else is exact.
    """
    give_back()
    outputs = measured.checked_outputs(**options)
    if len(adapters) < 2:
        raise refuse("USAGE", "one adapter has nothing to be compared with", wanted="two or more", got="1")
    layouts = [measured.open_adapter(adapter) for adapter in adapters]
    with uncollected():  # torch
        from d2surgery.checkpoint import Checkpoint
        from d2surgery.surveying.adapter import labels
        from d2surgery.surveying.modules import compare

    checkpoints = [Checkpoint(layout) for layout in layouts]
    with progress_bar("comparing", show=outputs.show_progress, unit=" modules") as progress:
        pairs = compare(checkpoints, exact_signs=exact_signs, progress=progress)
    found = [
        _compared((adapters[i], checkpoints[i]), (adapters[j], checkpoints[j]), modules)
        for (i, j), modules in pairs.items()
    ]

    def rows() -> list[Row]:
        return [row for each in found for row in difference_rows(each.modules, f"{each.first} and {each.second}")]

    measured.show(outputs, {"pairs": [_record(each) for each in found]}, _text(found, outputs.per_layer), rows)
    measured.draw(outputs, lambda: _figures(labels(adapters), found), f"{len(adapters)} adapters compared")
    return 0


def _compared(
    first: "tuple[str, Checkpoint]", second: "tuple[str, Checkpoint]", modules: "Mapping[str, Difference]"
) -> Compared:
    from d2surgery.measures.likeness import likeness
    from d2surgery.surveying.modules import places

    if not modules:
        raise refuse("USAGE", "the adapters have no module in common", wanted=first[0], got=second[0])
    names = [[place.name for place in places(checkpoint)] for _, checkpoint in (first, second)]
    only = [[name for name in each if name not in modules] for each in names]
    return Compared(first[0], second[0], modules, only[0], only[1], likeness(modules))


def _figures(names: Sequence[str], found: Sequence[Compared]) -> list["Plot"]:
    from d2surgery.measures.likeness import closest
    from d2surgery.reporting.figures import likeness as figures  # plotly, and only where figures are drawn

    wholes = dict(zip(combinations(range(len(names)), 2), (each.whole for each in found), strict=True))
    plots = [figures.similarity_matrix(names, wholes)]
    pairs = dict(zip(wholes, found, strict=True))
    for i, j in closest(wholes, figures.MOST_PAIRS):
        each = pairs[i, j]
        two = (names[i], names[j])
        plots += [figures.similarity_by_depth(each.modules, two), figures.subspaces_by_depth(each.modules, two)]
    return plots


# As JSON --------------------------------------------------------------------------------------------------------------


def _record(compared: Compared) -> dict[str, Any]:
    fields = compared._asdict()
    return fields | {"modules": [{"module": m} | _module(d) for m, d in compared.modules.items()]}


def _module(record: "Difference") -> dict[str, Any]:
    from d2surgery.measures.likeness import SIDES

    return {
        "cosine": record.cosine.value,
        "cosine_null_sd": record.cosine.null_sd,
        "frobenius_norms": record.norms,
        "sign_agreement": record.signs.share,
        "sign_agreement_null": record.signs.null,
        "sign_agreement_standard_error": record.signs.standard_error,
        **{side: _side(getattr(record, side)) for side in SIDES},
    }


def _side(found: "Shared | None") -> dict[str, Any] | None:
    if found is None:
        return None
    from d2surgery.measures.likeness import phi

    similarity, null = phi(found) or (None, None)
    return {"similarity": similarity, "null": null, "principal_angles": found.angles}


# As text --------------------------------------------------------------------------------------------------------------


def _text(found: Sequence[Compared], per_layer: bool) -> Iterator[str]:
    from d2surgery.measures.likeness import SAMPLE, likeness

    for compared in found:
        yield from output.prose(f"{output.printable(compared.first)} and {output.printable(compared.second)}:")
        yield from output.prose(f"  {verdict(compared.whole)}")
        yield ""
        rows = [["", "cosine", "φ in", "φ out", "signs"], ["all modules", *_cells(compared.whole)]]
        for name, modules in measured.groups(compared.modules, per_layer).items():
            rows.append([name, *_cells(likeness({module: compared.modules[module] for module in modules}))])
        rows.append(["by chance", *_chance(compared.whole)])
        yield from output.table(rows)
        yield ""
        yield from output.prose(_coverage(compared))
        if compared.whole.signs_error:
            yield from output.prose(
                f"signs: of {SAMPLE} entries of each large module, over all ± {compared.whole.signs_error:.1g} (one "
                "standard error); --exact-signs counts every entry."
            )
    yield from output.prose(
        "cosine: of the updates. φ in, φ out: share of one's input or output directions that the other uses too. "
        "signs: share of entries of equal sign; by chance is that of Gaussian entries with the same cosine."
    )


def verdict(whole: "Likeness") -> str:
    """One sentence on how alike two adapters are."""
    return f"{whole.in_words()}: cosine {whole.cosine:z.3f}, by chance ±{whole.cosine_null:.1g}."


def _cells(whole: "Likeness") -> list[str]:
    return [_number(value) for value in (whole.cosine, whole.in_features, whole.out_features, whole.signs)]


def _chance(whole: "Likeness") -> list[str]:
    return [f"±{whole.cosine_null:.1g}", *map(_number, (whole.in_null, whole.out_null, whole.signs_null))]


def _number(value: float) -> str:
    return f"{value:z.3f}" if value == value else "–"


def _coverage(compared: Compared) -> str:
    only = f"{len(compared.only_first)} only in the first, {len(compared.only_second)} only in the second"
    return f"{output.count(len(compared.modules), 'module')} in both, {only}"
