"""`d2surgery explain`: what a problem code means, what is assumed of an engine."""

from difflib import get_close_matches

import click

from d2surgery.cli import output
from d2surgery.codes import CODES
from d2surgery.errors import refuse
from d2surgery.formats.engines import ENGINES


@click.command(name="explain")
@click.argument("code", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(code: str | None, as_json: bool) -> None:
    """What a problem CODE means and what to do; of an engine, what is assumed of it; without CODE, the list of all."""
    if code in ENGINES:
        _explain_engine(code, as_json)
        return
    names = sorted(CODES) if code is None else [_known(code)]
    if as_json:
        output.emit_json({"codes": [{"code": name, **CODES[name]._asdict()} for name in names]})
    elif code is None:
        for line in output.table([(name, CODES[name].meaning) for name in names]):
            output.emit(line)
    else:
        output.emit(f"{names[0]}: {CODES[names[0]].meaning}")
        output.emit(f"  {CODES[names[0]].remedy}")


def _explain_engine(name: str, as_json: bool) -> None:
    rules = {field: value for field, value in ENGINES[name]._asdict().items() if value not in ("", (), 0)}
    if as_json:
        output.emit_json({"engine": name, **rules})
        return
    output.emit(f"{rules.pop('title')}: {rules.pop('source')}")
    for line in output.table([(field, _words(value)) for field, value in rules.items()]):
        output.emit(line)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(words for words in map(_words, value) if words)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _known(code: str) -> str:
    name = code.upper().replace("-", "_")
    if name in CODES:
        return name
    near = get_close_matches(name, CODES, n=3, cutoff=0.5)
    wanted = ", ".join(near) or "one of those that `d2surgery explain` lists"
    raise refuse("USAGE", f"there is no code {name}", wanted=wanted)
