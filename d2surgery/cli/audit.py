"""`d2surgery audit`: is the merged checkpoint the base with the adapter?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from d2surgery import audit_files
from d2surgery.auditing import audit
from d2surgery.cli import measured, output
from d2surgery.cli.options import progress_bar
from d2surgery.findings import Audit, Thresholds, document

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path)
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
_DEFAULTS = Thresholds()


@click.command(name="audit")
@click.option("--base", type=_DIRECTORY, required=True, help="Model directory that was merged into.")
@click.option("--adapter", required=True, help="File, directory or hub id org/name[@revision].")
@click.option("--merged", type=_DIRECTORY, required=True, help="Model directory to be judged.")
@click.option(
    "--strength-pass", type=float, default=_DEFAULTS.strength_pass, show_default=True, help="Right: |λ − 1| at most."
)
@click.option(
    "--strength-fail", type=float, default=_DEFAULTS.strength_fail, show_default=True, help="Wrong: |λ − 1| above."
)
@click.option("--exact", is_flag=True, help="Fail on one differing bit.")
@click.option("--html", type=_FILE, help="Write the audit as one page: verdict, causes, layers, every tensor.")
@click.option("--junit", type=_FILE, help="Write JUnit XML, a test case per module and tensor.")
@click.option("--sarif", type=_FILE, help="Write SARIF 2.1.0, a result per reason.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print the verdict only.")
def command(
    strength_pass: float, strength_fail: float, exact: bool, html: Path | None, junit: Path | None,
    sarif: Path | None, as_json: bool, quiet: bool, **inputs: Any,
) -> int:  # fmt: skip
    """Is MERGED the BASE with the ADAPTER? Every tensor accounted for, every difference explained.

    Exit code 0 pass, 1 fail, 2 could not be audited, 3 inconclusive.
    """
    if not 0 <= strength_pass <= strength_fail:
        raise click.UsageError("0 <= --strength-pass <= --strength-fail")
    for path in (html, junit, sarif):
        if path is not None:
            measured.require_folder(path)
    limits = Thresholds(strength_pass=strength_pass, strength_fail=strength_fail, exact=exact)
    with progress_bar("auditing", show=not (as_json or quiet)) as progress:
        found = audit(**inputs, thresholds=limits, progress=progress)
    _write(found, html, junit, sarif)
    if as_json:
        output.emit_json(document(found))
    else:
        for line in _text(found, quiet):
            output.emit(line)
    return _EXIT[found.verdict]


def _write(found: Audit, html: Path | None, junit: Path | None, sarif: Path | None) -> None:
    if junit is not None:
        measured.write_whole(junit, audit_files.junit(found))
    if sarif is not None:
        measured.write_whole(sarif, audit_files.sarif(found))
    if html is not None:
        from d2surgery.audit_page import audit_page  # plotly, where a page is asked for

        measured.write_whole(html, audit_page(found))


def _text(found: Audit, quiet: bool) -> Iterator[str]:
    yield output.style(found.verdict.upper(), _COLOURS[found.verdict])
    if quiet:
        return
    yield from output.problem_lines(found.reasons)
    counts = found.coverage
    named = [f"{count} {status}" for status, count in counts.items() if status != "total" and count]
    yield f"{output.count(counts['total'], 'tensor')}: {', '.join(named)}"
