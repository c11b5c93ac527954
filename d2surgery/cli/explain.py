"""`d2surgery explain`: what a problem code or a number means, what is assumed of an engine."""

from difflib import get_close_matches

import click

from d2surgery.cli import output
from d2surgery.codes import CODES
from d2surgery.errors import refuse
from d2surgery.formats.engines import ENGINES
from d2surgery.measures.table import MEASURES, find


@click.command(name="explain")
@click.argument("code", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(code: str | None, as_json: bool) -> None:
    """What a problem CODE means and what to do; what a number such as entropy_rank is; of an engine, what is assumed of
    it; without CODE, the list of all."""
    if code in ENGINES:
        _explain_engine(code, as_json)
        return
    if code is not None and (measure := find(code)) is not None:
        _explain_measure(measure, as_json)
        return
    names = sorted(CODES) if code is None else [_known(code)]
    if as_json:
        measures = [{"measure": name, **measure._asdict()} for name, measure in MEASURES.items()]
        codes = [{"code": name, **CODES[name]._asdict()} for name in names]
        output.emit_json({"codes": codes} | ({"measures": measures} if code is None else {}))
    elif code is None:
        for line in output.table([(name, CODES[name].meaning) for name in names]):
            output.emit(line)
        output.emit()
        for line in output.table([(name, measure.word, measure.formula) for name, measure in MEASURES.items()]):
            output.emit(line)
    else:
        output.emit(f"{names[0]}: {CODES[names[0]].meaning}")
        output.emit(f"  {CODES[names[0]].remedy}")


def _explain_measure(name: str, as_json: bool) -> None:
    measure = MEASURES[name]
    if as_json:
        output.emit_json({"measure": name, **measure._asdict()})
        return
    word = "" if measure.word == name or measure.formula.startswith(measure.word) else f" ({measure.word})"
    output.emit(f"{name}{word}: {measure.formula}")
    output.emit(f"  {measure.says}")


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
    known = {**{each: each for each in CODES}, **{each.upper(): each for each in MEASURES}}
    near = [known[each] for each in get_close_matches(name, known, n=3, cutoff=0.5)]
    wanted = ", ".join(near) or "one of those that `d2surgery explain` lists"
    raise refuse("USAGE", f"there is no code or measure {name}", wanted=wanted)
