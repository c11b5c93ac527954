"""The package as a whole: layers, the weight of imports, public names, metadata, codes."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

import d2surgery
from d2surgery.codes import CODES

PACKAGE = Path(d2surgery.__file__).parent
ROOT = PACKAGE.parent

# The wings of the house: a module imports only from its own wing and from those that stand above it here.
WINGS = (
    "codes", "errors", "kinds", "machine", "tables", "files", "adapters", "formats", "placement", "checkpoint",
    "cards", "measures", "surveying", "merging", "surgery", "live", "peft_plugin", "evaluating", "auditing", "training",
    "reporting", "verbs", "cli", "__main__",
)  # fmt: skip
HEAVY = ("torch", "numpy", "scipy", "transformers", "plotly", "peft", "safetensors", "huggingface_hub", "click")


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """The dotted name within the package: `files.header`, `merging` for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing(dotted: str) -> str:
    return dotted.partition(".")[0]


MODULES = {name_of(path): path for path in source_files()}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of the package that a file imports, inside functions too, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("d2surgery."):
                inner = name.removeprefix("d2surgery.")
                yield inner if inner in MODULES else inner.rpartition(".")[0], node.lineno


def run(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def project() -> dict[str, Any]:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("not in a checkout")
    return tomllib.loads(path.read_text())


# Wings -----------------------------------------------------------------------------------------------------------


def test_every_module_stands_in_a_wing() -> None:
    assert {wing(name) for name in MODULES} == set(WINGS)
    assert len(set(WINGS)) == len(WINGS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_wings_above(name: str) -> None:
    below = [
        f"line {line}: {other}"
        for other, line in imported(MODULES[name])
        if WINGS.index(wing(other)) > WINGS.index(wing(name))
    ]
    assert below == []


def test_no_imports_go_round_in_a_circle() -> None:
    """Inside functions and for type checkers too. A package stands for its `__init__`."""
    left = {name: {other for other, _ in imported(path)} & set(MODULES) - {name} for name, path in MODULES.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


def test_the_wing_test_sees_imports_of_every_spelling(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import d2surgery.files.base\nfrom d2surgery.merging import tiles\n"
        "from d2surgery import cli\nfrom d2surgery.formats import peft\nimport os\n"
        "def f():\n    from d2surgery.cli.output import emit\n"
    )
    assert sorted(imported(path)) == [
        ("cli", 3), ("cli.output", 7), ("files.base", 1), ("formats.peft", 4), ("merging.tiles", 2)
    ]  # fmt: skip


def test_measures_know_tensors_only() -> None:
    for path in (PACKAGE / "measures").rglob("*.py"):
        wings = {wing(name) for name, _ in imported(path) if name != "files.tensors"}
        assert wings <= {"errors", "adapters", "measures"}, path


# Size ------------------------------------------------------------------------------------------------------------

TABLES = {"codes"}  # modules that are one table


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_longer_than_a_reader_takes_in(name: str) -> None:
    text = MODULES[name].read_text()
    longest = {ast.ClassDef: 200, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
    too_long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > longest[type(node)]
    ]
    assert too_long == []
    assert name in TABLES or len(text.splitlines()) <= 450


# Imports ---------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert run(f"import sys, d2surgery; print(*sorted(set(sys.modules) & set({HEAVY})))").split() == []


def test_reading_an_adapters_names_and_shapes_needs_no_torch() -> None:
    code = f"import sys; from d2surgery import open_layout; print(*sorted(set(sys.modules) & set({HEAVY})))"
    assert {"torch", "numpy", "transformers", "plotly", "peft"} & set(run(code).split()) == set()


def test_a_merge_that_does_not_fit_is_refused_without_torch(tmp_path: Path) -> None:
    """Names and shapes come first: torch is imported while the base is being hashed."""
    code = f"""
import sys, d2surgery
try:
    d2surgery.merge({str(tmp_path / "base")!r}, {str(tmp_path / "adapter")!r}, "out")
except d2surgery.D2SurgeryError:
    print(*sorted(set(sys.modules) & set({HEAVY})))
"""
    assert set(run(code).split()) <= {"huggingface_hub"}


def test_no_public_name_imports_transformers_plotly_or_peft() -> None:
    code = "import sys; from d2surgery import *; print(*{'transformers', 'plotly', 'peft'} & set(sys.modules))"
    assert run(code).split() == []


def test_every_public_name_imports_without_a_warning() -> None:
    run("import d2surgery; [getattr(d2surgery, name) for name in d2surgery.__all__]", "-W", "error")


# Public names and metadata ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", d2surgery.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(d2surgery, name)
    assert name in dir(d2surgery)
    if callable(value):
        assert value.__name__ == name
        assert value.__module__.startswith("d2surgery.")
        assert value.__doc__


def test_public_names_are_sorted_and_once() -> None:
    assert list(d2surgery.__all__) == sorted(set(d2surgery.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        d2surgery.nonsense  # noqa: B018


def test_the_version_is_that_of_the_metadata_and_the_changelog_has_it_or_is_unreleased() -> None:
    assert d2surgery.__version__ == version("d2surgery") == project()["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{d2surgery.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_the_console_script_is_the_main_function() -> None:
    from d2surgery.cli import main

    (script,) = entry_points(group="console_scripts", name="d2surgery")
    assert script.load() is main


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert project()["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["d2surgery"]}


def test_what_is_imported_is_declared() -> None:
    nodes = [node for path in source_files() for node in ast.walk(ast.parse(path.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    third_party = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"d2surgery"}
    extras = project()["project"]["optional-dependencies"]
    lines = [
        *project()["project"]["dependencies"],
        *(line for name in extras if name != "test" for line in extras[name]),
    ]
    declared = {re.split(r"[<>=!~ ]", line)[0] for line in lines}
    assert third_party <= declared


def test_what_was_tested_satisfies_what_is_declared() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    declared = project()["project"]
    for line in [*declared["dependencies"], *declared["optional-dependencies"]["test"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line
    assert "+" not in "".join(lines), "a local version cannot be installed elsewhere"


# README ----------------------------------------------------------------------------------------------------------


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    found = re.findall(r"^<!-- \.ci/run: (\w+) -->\n```sh\n(.+)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = dict(found)
    assert list(commands) == ["demo", "test"]
    assert commands["demo"].endswith("d2surgery demo")
    assert commands["test"].endswith("pytest -n auto")
    assert all(" -c constraints.txt " in command for command in commands.values())


# Codes -----------------------------------------------------------------------------------------------------------

REPORTERS = {"Problem", "refuse", "problem", "_skip", "say", "said"}


def raised_codes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What stands where a code belongs in a call that reports a problem."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in REPORTERS:
            places = [*node.args[:2], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
            constants = (part for place in places for part in ast.walk(place) if isinstance(part, ast.Constant))
            for part in constants:
                if isinstance(part.value, str) and re.fullmatch(r"[A-Z]+(_[A-Z]+)+|USAGE|MEMORY|PICKLE", part.value):
                    yield part.value, part.lineno


def test_every_code_raised_is_one_that_explain_knows() -> None:
    unknown = [
        f"{path.name}:{line} {code}"
        for path in source_files()
        for code, line in raised_codes(ast.parse(path.read_text()))
        if code not in CODES
    ]
    assert unknown == []


def test_every_code_that_explain_knows_is_used() -> None:
    sources = [path.read_text() for path in source_files() if path.name != "codes.py"]
    constants = {node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert set(CODES) - constants == set()


def test_the_code_test_sees_codes() -> None:
    code = 'refuse("NO_SUCH", "x"); self.problem("OTHER_ONE" if a else "THIRD_ONE", "y"); Problem(code="USAGE")'
    assert [name for name, _ in raised_codes(ast.parse(code))] == ["NO_SUCH", "OTHER_ONE", "THIRD_ONE", "USAGE"]
