"""The documents: what they cite exists, every link leads somewhere, and what they call exact is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_package import WINGS

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = [ROOT / "README.md", CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = [path for folder in ("d2surgery", "tests", "analyses") for path in sorted((ROOT / folder).rglob("*.py"))]

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def defined(path: Path) -> set[str]:
    """`name` and `Class.name` of all that a module defines, imports left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for name in names_bound(node):
            found.add(name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in names_bound(inner)}
    return found


def names_bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


@cache
def words_of_the_code() -> set[str]:
    """Every word of the package's and the tests' sources, this file left out."""
    return {word for path in PYTHON if path != Path(__file__) for word in re.findall(r"\w+", path.read_text())}


# What is cited ---------------------------------------------------------------------------------------------------


@every_document
def test_every_cited_file_exists_and_defines_what_is_cited(document: Path) -> None:
    """`path.py` or `path.py: name, Class.name`."""
    missing = []
    for path, names in re.findall(r"`((?:d2surgery|tests|analyses)/[\w/.-]+)(?:: ([\w., ]+))?`", document.read_text()):
        if not (ROOT / path).exists():
            missing.append(path)
        elif names:
            missing += [f"{path}: {name}" for name in names.split(", ") if name not in defined(ROOT / path)]
    assert missing == []


@every_document
def test_every_name_of_code_in_the_text_is_one(document: Path) -> None:
    """What stands in backticks and looks like a name: CamelCase, capitals, or words joined by underscores or dots."""
    known = words_of_the_code() | FOREIGN
    cited = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", without_code(document.read_text()))
    names = {part for name in cited for part in name.split(".") if re.search(r"[a-z]_[a-z]|[a-z][A-Z]|[A-Z]{4}", part)}
    assert names - known == set()


FOREIGN = {"convert_to_lora"}  # names of other tools


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_document_that_code_cites_has_the_section() -> None:
    cited = {
        (path.name, document, anchor)
        for path in PYTHON
        for document, anchor in re.findall(r"((?:docs/)?[\w-]+\.md)#([\w-]+)", path.read_text())
        if path != Path(__file__)
    }
    assert len({document for _, document, _ in cited}) >= 1
    assert [cite for cite in cited if cite[2] not in anchors(ROOT / cite[1])] == []


def test_no_file_cites_a_document_that_is_not_here() -> None:
    away = re.compile(r"\bMATH\b|\bpeft\.md\b|\b(ARCHITECTURE|LAYOUT|STYLE|analysis)\.md\b|\.\./shared")
    texts = {path.name: path.read_text() for path in [*PYTHON, *DOCUMENTS] if path != Path(__file__)}
    assert [name for name, text in texts.items() if away.search(text)] == []


def test_the_wings_are_drawn_in_the_order_in_which_they_may_import() -> None:
    drawn = re.search(r"^### Wings$.*?^```\n(.+?)^```$", CONTRIBUTING.read_text(), re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert tuple(line.split()[0] for line in drawn[1].splitlines()) == WINGS


# Conversions that docs/mathematics.md calls exact, and no function makes yet ---------------------------------------


def norms(matrix: Any) -> Any:
    return np.sqrt((matrix**2).sum(0))


@pytest.fixture
def weights() -> tuple[Any, Any]:
    """W0 and an update of 5 % of it, of rank 3; its vectors are its columns."""
    generator = np.random.default_rng(2)
    W = generator.normal(size=(24, 17))
    U = generator.normal(size=(24, 3)) @ generator.normal(size=(3, 17))
    return W, 0.05 * U * np.linalg.norm(W) / np.linalg.norm(U)


def d2(W: Any, U: Any) -> Any:
    return (W + U) * (norms(W) / norms(W + U)) + U


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())


def test_a_d2_lora_is_a_dora_of_the_same_rank_and_axis(weights: tuple[Any, Any]) -> None:
    W, U = weights
    c = norms(W) / norms(W + U)
    update = U * (1 + 1 / c)
    V = W + update
    same(norms(d2(W, U)) * V / norms(V), d2(W, U))
    assert np.linalg.matrix_rank(update) == np.linalg.matrix_rank(U)


def test_a_d2_lora_as_lora_errs_by_what_the_projection_does_to_the_base(weights: tuple[Any, Any]) -> None:
    W, U = weights
    c = norms(W) / norms(W + U)
    same(d2(W, U) - W - (1 + c) * U, (c - 1) * W)


def test_a_lora_is_a_d2_lora_in_closed_form(weights: tuple[Any, Any]) -> None:
    W, L = weights
    half = W + L / 2
    U = W + L - half * norms(W) / norms(half)
    same(d2(W, U), W + L)
    assert np.linalg.matrix_rank(U) > 2 * np.linalg.matrix_rank(L)


def test_the_base_follows_from_a_merged_d2_lora(weights: tuple[Any, Any]) -> None:
    W, U = weights
    star = d2(W, U) - U
    a, b, c = norms(star) ** 2, (star * U).sum(0), norms(U) ** 2 - norms(star) ** 2
    same(star * ((b + np.sqrt(b**2 - a * c)) / a) - U, W)


def test_a_rescaled_base_makes_a_lora_of_a_dora(weights: tuple[Any, Any]) -> None:
    W, U = weights
    m = norms(W + U) * np.linspace(0.9, 1.1, W.shape[1])
    a = m / norms(W + U)
    same(m * (W + U) / norms(W + U), a * W + a * U)


def test_the_lengths_of_a_d2_lora_are_those_of_its_expansion(weights: tuple[Any, Any]) -> None:
    W, U = weights
    U = 0.2 * U
    radial = (W * U).sum(0) / norms(W) ** 2
    across = norms(U) ** 2 / norms(W) ** 2 - radial**2
    found = norms(d2(W, U)) / norms(W) - 1
    np.testing.assert_allclose(found, radial + 1.5 * across, rtol=0, atol=10 * (norms(U) / norms(W)).max() ** 3)


def test_the_gain_of_rounding_is_its_closed_form() -> None:
    """gain = 2t·Σ φ((k + ½)t), t the spacing of the stored numbers over the delta's size."""
    generator = np.random.default_rng(3)
    spacing, sd = 2.0**-8, 2.0**-8 / 3.5  # numbers from 1 to 2 in bfloat16: the gain is about 0.5
    base = 1 + spacing * generator.integers(20, 100, size=400_000)
    delta = sd * generator.normal(size=base.size)
    applied = np.round((base + delta) / spacing) * spacing - base
    t = spacing / sd
    wanted = 2 * t * sum(np.exp(-(((k + 0.5) * t) ** 2) / 2) / np.sqrt(2 * np.pi) for k in range(50))
    assert (applied * delta).sum() / (delta**2).sum() == pytest.approx(wanted, abs=0.01)
