"""`d2surgery merge`: a merged checkpoint, streamed, whole or not there."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2surgery.cli import output
from d2surgery.cli.options import job_options, jobs_option, progress_bar
from d2surgery.machine import give_back
from d2surgery.merging import merge


@click.command(name="merge")
@job_options
@click.option("--resume", is_flag=True, help="Continue an interrupted merge with the same arguments.")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Hash the base again, though an earlier merge hashed the same file; or neither hash nor fsync: faster, but no "
    "hashes in the receipt.",
)
@jobs_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print warnings only.")
def command(out: Path, resume: bool, verify: bool | None, as_json: bool, quiet: bool, **job: Any) -> int:
    """Write BASE with ADAPTER merged into it to OUT, which transformers then loads.

    W0 + strength·delta is computed one precision above the output and rounded once. Memory does not grow with the
    model. OUT appears when everything is written; its d2surgery_merge.json has the sha256 of every tensor.
    """
    give_back()
    with progress_bar("merging", show=not (as_json or quiet)) as progress:
        report = merge(out=out, resume=resume, verify=verify, progress=progress, **job)
    if as_json:
        output.emit_json(asdict(report) | {"problems": [output.record(problem) for problem in report.problems]})
        return 0
    for line in output.problem_lines(p for p in report.problems if p.severity != "info"):
        output.emit(line, err=True)
    if not quiet:
        modules, tensors = (
            output.count(n, w) for n, w in ((report.modules_merged, "module"), (report.tensors_written, "tensor"))
        )
        output.emit(f"{output.style('OK', 'green')}  {modules} merged: {tensors}, {output.size(report.bytes_written)}")
        output.emit(f"  out      {output.printable(report.out)}")
        for line in (*output.taken(report.problems), *output.beside(report.copied, report.left)):
            output.emit(line)
        output.emit(f"  receipt  {output.printable(report.receipt)}")
        output.emit(f"  took     {report.seconds:.1f} s, {output.size(report.peak_memory_bytes)} at most")
    return 0
