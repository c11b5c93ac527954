"""What can be wrong: one record and one exception; `codes` has the table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Severity = Literal["info", "warning", "error"]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where, what was wanted, what was found."""

    code: str
    message: str
    severity: Severity = "error"
    file: str = ""
    module: str = ""
    wanted: str = ""
    got: str = ""

    def __post_init__(self) -> None:
        _ = self.remedy  # a code nobody can explain is a bug

    @property
    def remedy(self) -> str:
        from d2surgery.codes import CODES  # where nothing is wrong, its text is not read

        return CODES[self.code].remedy

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.module) if part)
        details = "; ".join(f"{k} {v}" for k, v in (("wanted", self.wanted), ("got", self.got)) if v)
        return f"{self.code}{f' {where}' if where else ''}: {self.message}{f' ({details})' if details else ''}"


class Problems:
    """What has been found wrong so far, to be said all at once."""

    def __init__(self, file: str = "") -> None:
        self.file = file  # of problems that name none
        self.all: list[Problem] = []

    def __call__(self, code: str, message: str, severity: Severity = "error", **where: str) -> None:
        where.setdefault("file", self.file)
        self.all.append(Problem(code=code, message=message, severity=severity, **where))


class D2SurgeryError(Exception):
    """Raised with every problem that was found, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class NoSuchName(D2SurgeryError, KeyError):
    """A module or a tensor that is not there. A KeyError too, so that mappings keep their `get` and `in`."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def found_in(names: Mapping[str, Value], name: str, what: str, file: str = "") -> Value:
    """names[name]. Raises NoSuchName with the nearest names."""
    try:
        return names[name]
    except KeyError:
        from difflib import get_close_matches  # seldom needed

        near = get_close_matches(str(name), names, n=3, cutoff=0.5)
        wanted = ", ".join(near) or f"one of {len(names)}"
        problem = Problem(
            code="UNKNOWN_NAME", message=f"there is no such {what}", file=file, wanted=wanted, got=str(name)
        )
        raise NoSuchName(problem) from None


def refuse(code: str, message: str, **details: str) -> D2SurgeryError:
    """The error that says one thing."""
    return D2SurgeryError(Problem(code=code, message=message, **details))  # type: ignore[arg-type]


def brief(value: Any, length: int = 80) -> str:
    """A value of any kind in few words, for a message."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of too many digits, lists in lists without end
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def raise_errors(problems: Iterable[Problem]) -> None:
    """Raise if any problem is an error; warnings and notes pass."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise D2SurgeryError(*errors)
