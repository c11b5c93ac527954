"""`d2surgery demo`: a base, an adapter of each kind, inspect → plan → merge → audit, against the formula; a report."""

from pathlib import Path

import click

from d2surgery.machine import uncollected


@click.command(name="demo")
@click.option("--out", type=click.Path(path_type=Path), help="Keep everything in this new directory.")
def command(out: Path | None) -> int:
    """Build a small Llama-shaped base and an adapter of each kind, then inspect, plan, merge and audit each.

    Every merged element is compared with the formula evaluated in float64 on whole matrices. Then one merge is broken
    on purpose and audited again. At the end stands a report of the four, one page to open in a browser: --out keeps
    it as report.html.
    """
    with uncollected():  # torch
        from d2surgery.cli import example

    example.run(out)
    return 0
