"""What `convert --to` says of an adapter that was written in another format: what was exact, padded and folded."""

from collections.abc import Iterator
from itertools import chain
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2surgery.cards import write_card
from d2surgery.cli import measured, output
from d2surgery.cli.surgical import copy_tokenizer
from d2surgery.formats import FORMATS
from d2surgery.kinds import TABLE

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint

WRITTEN = [format.NAME for format in FORMATS if any(map(format.holds, TABLE))]


class _Module(NamedTuple):
    """One module as it was and as it reads back."""

    ranks: tuple[int | None, int | None]
    scalings: tuple[float | None, float | None]
    difference: float  # ‖ΔW − ΔW′‖/‖ΔW‖

    @property
    def how(self) -> str:
        changed = [word for word, pair in (("padded", self.ranks), ("folded", self.scalings)) if not _same(*pair)]
        return " and ".join(changed) or ("the same bits" if self.difference == 0 else "rounded")


def rewrite(checkpoint: "Checkpoint", out: Path, form: str, outputs: measured.Outputs) -> None:
    """Write, read back, and say by module what became of it."""
    from d2surgery.checkpoint import differences, load, save  # torch

    written = save(checkpoint, out, format=form)
    beside = copy_tokenizer(checkpoint, out)
    write_card(out, base_model=checkpoint.layout.base_model or "")
    back = load(out)
    found = written or differences(checkpoint, back)
    before, after = checkpoint.layout.adapters, back.layout.adapters
    modules = {
        module: _Module(
            (entry.rank, after[module].rank), (entry.scaling, after[module].scaling), found[module]
        )
        for module, entry in before.items()
    }  # fmt: skip
    zeros = sorted(after.keys() - before.keys())  # rows of a joined module
    told = _document(modules, form, out) | {"tokenizer": beside, "zeros": zeros}
    lines = _text(modules, measured.kinds(checkpoint), form, out, outputs.per_layer)
    measured.show(outputs, told, chain(lines, _zeros(zeros)), lambda: told["modules"])


def _document(modules: dict[str, _Module], form: str, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "format": form,
        "max_relative_difference": max(module.difference for module in modules.values()),
        "modules": [
            {"module": name, "rank": m.ranks[1], "scaling": m.scalings[1], "how": m.how,
             "relative_difference": m.difference}
            for name, m in modules.items()
        ],
    }  # fmt: skip


def _text(modules: dict[str, _Module], kinds: str, form: str, out: Path, per_layer: bool) -> Iterator[str]:
    worst = max(modules, key=lambda name: modules[name].difference)
    off = modules[worst].difference
    same = "the same bits" if {module.how for module in modules.values()} == {"the same bits"} else "the same deltas"
    said = f"the largest difference is {off:.2g} of the delta, on {output.printable(worst)}" if off else same
    what = f"{kinds} on {output.count(len(modules), 'module')} as {form}"
    yield f"{output.style('OK', 'green')}  {what}, read back: {said}"
    rows: list[tuple[str, ...]] = []
    for name, members in measured.groups(modules, per_layer).items():
        each = [modules[member] for member in members]
        ranks = {_arrow(*m.ranks) for m in each}
        scalings = {_arrow(*m.scalings) for m in each}
        how = ", ".join(sorted({m.how for m in each}))
        rows.append((name, f"rank {', '.join(sorted(ranks))}", f"scaling {', '.join(sorted(scalings))}", how,
                     f"{max(m.difference for m in each):.2g}"))  # fmt: skip
    yield from output.table(rows)
    yield f"  out  {output.printable(str(out))}"


def _zeros(modules: list[str]) -> Iterator[str]:
    """What was filled up so that a joined module is whole."""
    if modules:
        some = ", ".join(map(output.printable, modules[:3])) + ", …" * (len(modules) > 3)
        count = output.count(len(modules), "module")
        yield f"  zeros  {count} without an adapter, joined with others that have one: {some}"


def _arrow(*pair: float | None) -> str:
    before, after = (str(value) if isinstance(value, int) else output.number(value) for value in pair)
    return before if _same(*pair) else f"{before} → {after}"


def _same(before: float | None, after: float | None) -> bool:
    return before == after or (before is not None and after is not None and isclose(before, after, rel_tol=1e-12))
