"""Problems, the one exception, and the table that explains them."""

import ast
import re
from pathlib import Path

import pytest

import d2surgery.errors
from d2surgery.codes import CODES
from d2surgery.errors import D2SurgeryError, Problem, raise_errors, refuse

PACKAGE = Path(d2surgery.errors.__file__).parent


def test_a_problem_says_code_where_what_wanted_and_got() -> None:
    problem = Problem(code="USAGE", message="no", file="f", module="m", wanted="a", got="b")
    assert str(problem) == "USAGE f: m: no (wanted a; got b)"
    assert str(Problem(code="USAGE", message="no")) == "USAGE: no"
    assert problem.remedy == CODES["USAGE"].remedy


def test_a_code_that_nobody_can_explain_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        Problem(code="NO_SUCH_CODE", message="x")


def test_the_error_holds_all_errors_and_no_warnings() -> None:
    errors = [Problem(code="USAGE", message=str(n)) for n in range(2)]
    warning = Problem(code="USAGE", message="w", severity="warning")
    with pytest.raises(D2SurgeryError) as error:
        raise_errors([errors[0], warning, errors[1]])
    assert error.value.problems == tuple(errors)
    assert str(error.value) == "USAGE: 0\nUSAGE: 1"


def test_warnings_alone_pass() -> None:
    passed = [
        Problem(code="USAGE", message="w", severity="warning"),
        Problem(code="USAGE", message="i", severity="info"),
    ]
    raise_errors(passed)
    assert {problem.severity for problem in passed} == {"warning", "info"}


def test_refuse_is_one_problem() -> None:
    assert refuse("USAGE", "no", got="x").problems == (Problem(code="USAGE", message="no", got="x"),)


def test_every_code_is_spelt_alike_and_explained_in_sentences() -> None:
    for name, code in CODES.items():
        assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", name), name
        assert code.meaning.endswith(".") or code.meaning.endswith("?"), name
        assert code.remedy.endswith((".", "?", "]")), name


def used_codes() -> set[str]:
    """Every string constant of the package, outside the table itself, that is spelt like a code in it."""
    texts = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "errors.py"]
    constants = (node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {node.value for node in constants if isinstance(node.value, str)}


def test_every_code_of_the_readers_is_raised_somewhere() -> None:
    """The codes of inspecting; those of merging are for the tests of merging."""
    reading = list(CODES)[: list(CODES).index("BAD_BASE")]
    assert set(reading) - used_codes() - {"NOT_FINITE"} == set()
