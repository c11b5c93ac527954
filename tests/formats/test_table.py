"""The table of docs/formats.md is what FORMATS say. `python tests/formats/test_table.py` prints it."""

from importlib import import_module
from pathlib import Path

from d2surgery.formats import FORMATS, _Lazy
from d2surgery.formats.format import Format
from d2surgery.kinds import TABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
HEAD = ["| `--to` | format | read | written |", "|---|---|---|---|"]


def written(format: Format) -> str:
    """Kinds by the modules that they can be on: `LoRA, DoRA: linear, conv`."""
    kinds: dict[str, list[str]] = {}
    for kind, row in reversed(TABLE.items()):
        where = [name for name in ("linear", "embedding", "conv", "experts") if name in format.holds(kind)]
        if where:
            kinds.setdefault(", ".join(where), []).append(row.title)
    return "; ".join(f"{', '.join(titles)}: {where}" for where, titles in kinds.items()) or "–"


def table() -> list[str]:
    rows = []
    for format in FORMATS:
        to = f"`{format.NAME}`" if any(map(format.holds, TABLE)) else "–"
        rows.append(f"| {to} | {format.TITLE} | {format.READS} | {written(format)} |")
    return HEAD + rows


def test_the_page_has_the_formats() -> None:
    assert "\n".join(table()) in PAGE.read_text()


def test_a_format_that_is_not_imported_yet_has_its_modules_name() -> None:
    for format in FORMATS:
        assert isinstance(format, _Lazy)
        assert import_module(f"d2surgery.formats.{format.module}").NAME == format.NAME


if __name__ == "__main__":
    print("\n".join(table()))
