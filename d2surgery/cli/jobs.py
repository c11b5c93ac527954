"""A job file: what a verb is given, as TOML, in place of options on the line: `d2surgery merge job.toml`.

Keys are the names of options without their dashes, and of arguments; what stands on the line after the file comes
after it and wins. `train` has files of its own.

    base = "org/model@revision"
    adapter = "./my-adapter"
    out = "./merged"
    dtype = "bf16"
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from d2surgery.cli import guessing
from d2surgery.errors import D2SurgeryError, Problem, brief, refuse
from d2surgery.files.reading import read_toml

OWN_FILES = ("train",)
"""Verbs whose first argument is a file of their own form."""


def expanded(command: click.Command, words: list[str]) -> list[str]:
    """The words of a line, the job file that stands first among them replaced by what it says.

    Raises D2SurgeryError BAD_CONFIG for a file that is no TOML, and for every key that the verb has no place for.
    """
    if command.name in OWN_FILES:
        return words
    path = Path(words[0])
    options, arguments = _places(command)
    taken = read_toml(path)
    problems = [
        _unknown(key, command, path, options)
        for key in taken
        if _plain(key) not in options and _plain(key) not in arguments
    ]
    if problems:
        raise D2SurgeryError(*problems)
    named = {_plain(key): value for key, value in taken.items()}
    given = [word for key, value in named.items() if key in options for word in _words(options[key], value, path, key)]
    positional = [str(each) for key in arguments if key in named for each in _listed(named[key])]
    return [*given, *positional, *words[1:]]


def _unknown(key: str, command: click.Command, path: Path, options: Iterable[str]) -> Problem:
    near = ", ".join(name.lstrip("-") for name in guessing.option(f"--{key}", command)) or ", ".join(options)
    message = f"{command.name} has no such setting"
    return Problem(code="BAD_CONFIG", message=message, file=str(path), wanted=near, got=key)


def _places(command: click.Command) -> tuple[dict[str, click.Option], list[str]]:
    """Settings by the names of options, and the names of arguments in their order."""
    options = {
        name.lstrip("-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }
    return options, [parameter.name or "" for parameter in command.params if isinstance(parameter, click.Argument)]


def _words(option: click.Option, value: Any, path: Path, key: str) -> Iterator[str]:
    if option.is_flag:
        if not isinstance(value, bool):
            raise refuse("BAD_CONFIG", f"{key} is a switch", file=str(path), wanted="true or false", got=brief(value))
        names = option.opts if value is not (f"--{key}" in option.secondary_opts) else option.secondary_opts
        yield from sorted(names, key=len)[-1:]  # off is the default of a switch that has one side
        return
    if isinstance(value, list) and not option.multiple:
        raise refuse("BAD_CONFIG", f"{key} is one value", file=str(path), got=brief(value))
    if isinstance(value, bool | dict):
        raise refuse("BAD_CONFIG", f"{key} is a text or a number", file=str(path), got=brief(value))
    for each in _listed(value):
        yield f"{max(option.opts, key=len)}={each}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(key: str) -> str:
    return key.replace("_", "-")
