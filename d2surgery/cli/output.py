"""What every verb prints with: JSON documents, problem lines, tables that fit the terminal."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import TextIOWrapper
from typing import Any

import click

from d2surgery.errors import Problem, brief
from d2surgery.surveying.order import natural

SCHEMA_VERSION = 1
_LONGEST = 4000  # letters of a problem's line; --json has all
_MANY = 3  # problems that differ only in their module are shown together from here
COLOURS = {"error": "red", "warning": "yellow", "info": "cyan", "ok": "green"}


def tolerate_any_text() -> None:
    """Names in files are anybody's text; a character the terminal lacks must not end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hush(package: str) -> None:
    """Errors only of a package that logs each forward, as bitsandbytes does in 8 bit."""
    import logging  # as long in the import as all of a format

    logging.getLogger(package).setLevel(logging.ERROR)


def emit(line: str = "", *, err: bool = False) -> None:
    """One line. What could move the cursor is escaped, whoever's it is, and only what `style` coloured is coloured."""
    text = line if line.isprintable() else "".join(_COLOURED.get(char) or printable(char) for char in line)
    click.echo(text, err=err, color=False if os.environ.get("NO_COLOR") else None)


def prose(text: str) -> Iterator[str]:
    """Wrapped at the terminal's width."""
    import textwrap  # which few verbs need

    yield from textwrap.wrap(text, columns(), break_on_hyphens=False)


def emit_json(document: Mapping[str, Any]) -> None:
    """One document on stdout; NaN has no JSON form, so it raises ValueError here and not at the reader's."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **document}, allow_nan=False))


def emit_failure(problems: Sequence[Problem], *, as_json: bool) -> None:
    """What stopped a command: on stdout as JSON, or on stderr as text."""
    if as_json:
        emit_json({"error": str(problems[0]), "problems": [record(problem) for problem in problems]})
        return
    for line in problem_lines(problems):
        emit(line, err=True)


def record(problem: Problem) -> dict[str, str]:
    """A problem as JSON: its fields and its remedy."""
    names = ("code", "severity", "file", "module", "message", "wanted", "got", "remedy")
    return {name: getattr(problem, name) for name in names}


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """`severity CODE where: message (wanted …; got …)`, a remedy under the last of those that share it.

    Of many modules with one fault the first and a count: --json has each.
    """
    lines: list[str] = []
    pending = ""
    listed = sorted(problems, key=lambda problem: natural(problem.module))
    for problem in sorted(_gathered(listed), key=lambda p: (list(COLOURS).index(p.severity), p.code)):
        if pending and pending != problem.remedy:
            lines.append(f"  {pending}")
        pending = problem.remedy
        lines.append(f"{style(problem.severity, COLOURS[problem.severity])} {brief(printable(str(problem)), _LONGEST)}")
    return [*lines, f"  {pending}"] if pending else lines


def _gathered(problems: Iterable[Problem]) -> Iterator[Problem]:
    alike: dict[Problem, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(replace(problem, module=""), []).append(problem)
    for first, *others in alike.values():
        if len(others) < _MANY:
            yield from (first, *others)
        else:
            yield replace(first, module=f"{first.module} and {len(others)} more")


def taken(problems: Iterable[Problem]) -> list[str]:
    """Whose tokenizer a merge writes, where the adapter brings one."""
    return [f"  tokens   {printable(problem.message)}" for problem in problems if problem.code == "TOKENIZER_TAKEN"]


def beside(copied: Sequence[str], left: Sequence[str]) -> list[str]:
    """What a merge copies beside the weights, and what it leaves in the base's directory."""
    lines = [("beside", copied), ("left", left)]
    return [f"  {word:7}  {printable(', '.join(names))}" for word, names in lines if names]


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Aligned columns, empty ones left out; where they do not fit the terminal, the first on a line of its own."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    kept = [at for at, width in enumerate(widths) if width]
    if len(indent) + sum(widths[at] + 2 for at in kept) - 2 <= columns():
        return [(indent + "  ".join(row[at].ljust(widths[at]) for at in kept)).rstrip() for row in cells]
    return [line for first, *rest in cells for line in (indent + first, *_wrapped(filter(None, rest), indent * 2))]


def _wrapped(cells: Iterable[str], indent: str) -> list[str]:
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + 2 + len(cell) <= columns():
            lines[-1] += f", {cell}"
        else:
            lines.append(indent + cell)
    return lines


def columns() -> int:
    """The terminal's width; COLUMNS overrides it, and what is no terminal is wide."""
    chosen = os.environ.get("COLUMNS", "")
    if chosen.isdigit() and int(chosen):
        return int(chosen)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 120


def style(text: str, colour: str) -> str:
    """Marked to be coloured by `emit`, which leaves it where stdout is no terminal or NO_COLOR is set."""
    return f"{_mark(colour)}{printable(text)}{_mark('')}"


def _mark(colour: str) -> str:
    """A code point that is no character, so that no text has it for itself."""
    return chr(0xFDD0 + ["", *COLOURS.values()].index(colour))


_COLOURED = {
    _mark(colour): click.style("", fg=colour, reset=False) for colour in COLOURS.values()
} | {_mark(""): click.style("", reset=True)}  # fmt: skip


def printable(text: str) -> str:
    """Escape what could move the cursor: tensor names come from strangers."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size(count: int) -> str:
    """Bytes for people: 1.4 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def number(value: float | None) -> str:
    """Four digits, always recognisable as a real number; a question mark where unknown."""
    if value is None:
        return "?"
    text = f"{value:.4g}"
    return text if any(c in text for c in ".en") else f"{text}.0"


def count(amount: int, noun: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"
