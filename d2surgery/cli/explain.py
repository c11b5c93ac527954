"""`d2surgery explain`: what a problem code means."""

from difflib import get_close_matches

import click

from d2surgery.cli import output
from d2surgery.codes import CODES
from d2surgery.errors import refuse


@click.command(name="explain")
@click.argument("code", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(code: str | None, as_json: bool) -> None:
    """What a problem CODE means and what to do; without CODE, the list of all."""
    names = sorted(CODES) if code is None else [_known(code)]
    if as_json:
        output.emit_json({"codes": [{"code": name, **CODES[name]._asdict()} for name in names]})
    elif code is None:
        for line in output.table([(name, CODES[name].meaning) for name in names]):
            output.emit(line)
    else:
        output.emit(f"{names[0]}: {CODES[names[0]].meaning}")
        output.emit(f"  {CODES[names[0]].remedy}")


def _known(code: str) -> str:
    name = code.upper().replace("-", "_")
    if name in CODES:
        return name
    near = get_close_matches(name, CODES, n=3, cutoff=0.5)
    wanted = ", ".join(near) or "one of those that `d2surgery explain` lists"
    raise refuse("USAGE", f"there is no code {name}", wanted=wanted)
