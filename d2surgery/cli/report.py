"""`d2surgery report`: one HTML page that says what adapters do."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import click

from d2surgery.cli import measured, output
from d2surgery.cli.audit import EXIT, verdict_line
from d2surgery.cli.options import BASE_HELP, Adapter, Base, cache_option, exact_signs_option, jobs_option, progress_bar
from d2surgery.machine import give_back
from d2surgery.measures.table import Method
from d2surgery.verbs.reporting import check_page
from d2surgery.verbs.reporting import report as write


@click.command(name="report")
@click.argument("adapters", type=Adapter(), nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--base", type=Base(), help=f"{BASE_HELP}: adds drift and relative sizes.")
@click.option("--merged", type=Base(), help="With --base and one adapter, adds the merge's audit.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .html file.")
@click.option("--force", is_flag=True, help="Write over a page that is there.")
@click.option("--method", type=click.Choice(get_args(Method)), help="Of dense spectra. Default: by kind and size.")
@cache_option
@click.option("--intruders", is_flag=True, help="With --base, also intruder dimensions: slow on large models.")
@exact_signs_option
@jobs_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def command(
    adapters: tuple[str, ...],
    base: Path | None,
    merged: Path | None,
    out: Path,
    method: Method | None,
    cache: Path | None,
    intruders: bool,
    exact_signs: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write one self-contained page about one or more adapters: what they are, what stands out, every module, figures.

    Several adapters are shown side by side, with their similarity. The page works offline; about 5 MB of it is the
    drawing library plotly.js. With --merged the audit's verdict is printed and decides the exit code: 0 pass, 1 fail,
    3 inconclusive.
    """
    give_back()
    check_page(out, force=force)
    with ExitStack() as stack:

        def progress(label: str) -> Callable[[int, int], None]:
            bar = progress_bar(output.printable(label), show=not (as_json or quiet), unit=" modules")
            return stack.enter_context(bar)

        page = write(
            *adapters, base=base, merged=merged, out=out, force=force, method=method, with_intruders=intruders,
            exact_signs=exact_signs, cache=cache, progress=progress,
        )  # fmt: skip
    found = page.audit
    if as_json:
        audited = {"verdict": found.verdict} if found else {}
        output.emit_json({"out": str(out), "bytes": out.stat().st_size, "adapters": list(adapters), **audited})
    elif not quiet:
        output.emit(f"{output.style('OK', 'green')}  {output.count(len(adapters), 'adapter')} in one page")
        for line in measured.wrote([out]):
            output.emit(f"  {line}")
        if found:
            output.emit(verdict_line(found))
            for line in output.problem_lines(found.reasons):
                output.emit(line)
    return EXIT[found.verdict] if found else 0
