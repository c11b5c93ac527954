"""`d2surgery plan`: what merge would do, without writing."""

from collections.abc import Iterable
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2surgery.cli import output
from d2surgery.cli.options import planned_options, progress_bar
from d2surgery.files.dtypes import DTYPE_NAMES
from d2surgery.merging import PlanReport, plan
from d2surgery.surveying.order import in_order

if TYPE_CHECKING:
    from d2surgery.measures.fidelity import Survival

_SHORT = {name: short for short, name in DTYPE_NAMES.items()}


@click.command(name="plan")
@planned_options
@click.option("--per-layer", is_flag=True, help="Survival of every module, not of the weakest ones only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print warnings only.")
def command(out: Path | None, per_layer: bool, as_json: bool, quiet: bool, **job: Any) -> int:
    """What merge with the same arguments would write, need and keep. Writes nothing; --out says on which disk.

    Survival is computed from the deltas themselves: gain 1 means that rounding to the output dtype loses nothing of
    the adapter, below 0.95 it loses part of it.
    """
    with progress_bar("reading", show=not (as_json or quiet)) as progress:
        report = plan(out=out or Path("merged"), progress=progress, **job)
    if as_json:
        output.emit_json(_document(report))
        return 0
    for line in output.problem_lines(p for p in report.problems if p.severity != "info"):
        output.emit(line, err=True)
    for line in () if quiet else _text(report, per_layer):
        output.emit(line)
    return 0


def _document(report: PlanReport) -> dict[str, Any]:
    modules = [
        {"module": module, "survival": {_SHORT[dtype]: _record(s) for dtype, s in by_dtype.items()}}
        for module, by_dtype in in_order(report.survival).items()
    ]
    return {
        "out": report.out,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "disk_free_bytes": report.disk_free_bytes,
        "peak_memory_bytes": report.peak_memory_bytes,
        "shards": report.shards,
        "untied": report.untied,
        "copied": report.copied,
        "left": report.left,
        "modules": modules,
        "problems": [output.record(problem) for problem in report.problems],
    }


def _record(survival: "Survival") -> dict[str, float | None]:
    names = ("gain", "relative_error", "cosine", "changed_share")
    return {name: None if isnan(value := getattr(survival, name)) else value for name in names}


def _text(report: PlanReport, per_layer: bool) -> Iterable[str]:
    enough = report.bytes <= report.disk_free_bytes
    verdict = output.style("OK", "green") if enough else output.style("DISK TOO SMALL", "red")
    files = output.count(report.shards, "file")
    yield f"{verdict}  {output.count(report.modules, 'module')} into {output.count(report.tensors, 'tensor')}, {files}"
    yield f"  disk    {output.size(report.bytes)} of {output.size(report.disk_free_bytes)} free"
    yield f"  memory  about {output.size(report.peak_memory_bytes)}"
    yield from output.taken(report.problems)
    yield from output.beside(report.copied, report.left)
    if report.untied:
        yield "  ties    the output no longer equals the input embedding: both are written, tie_word_embeddings false"
    if not report.survival:
        return
    from d2surgery.measures.fidelity import LOW_GAIN, Survival  # torch, which plan has used

    yield ""
    yield "how much of the delta outlives rounding (gain, relative error):"
    dtypes = list(next(iter(report.survival.values())))
    total = {dtype: sum((by[dtype] for by in report.survival.values()), Survival()) for dtype in dtypes}
    weakest = sorted(in_order(report.survival), key=lambda module: _gain(report.survival[module][dtypes[0]]))
    shown = list(in_order(report.survival)) if per_layer else weakest[:5]
    rows = [(module, report.survival[module]) for module in shown]
    yield from output.table([_row("all modules", total), *(_row(module, by_dtype) for module, by_dtype in rows)])
    if len(shown) < len(report.survival):
        yield f"  … {len(report.survival) - len(shown)} modules that keep more (--per-layer)"
    low = [module for module, by in report.survival.items() if _gain(by[dtypes[0]]) < LOW_GAIN]
    if low:
        few = output.count(len(low), "module")
        yield f"{few} below {LOW_GAIN} in {_SHORT[dtypes[0]]}: --dtype fp32 keeps all of it"


def _gain(survival: "Survival") -> float:
    return 1.0 if isnan(survival.gain) else survival.gain


def _row(name: str, by_dtype: Any) -> list[str]:
    if all(not s.delta_squared for s in by_dtype.values()):
        return [name, "zero: there is nothing to lose", *[""] * (len(by_dtype) - 1)]
    cells = [
        f"{_SHORT[dtype]} {output.number(s.gain)}, {output.number(s.relative_error)}" for dtype, s in by_dtype.items()
    ]
    return [name, *cells]
