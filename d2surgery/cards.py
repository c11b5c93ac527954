"""The card beside an output: README.md with the front matter that the Hugging Face hub shows. No torch.

It is made of what the output says of itself, a merge's receipt or the header of an adapter, so it can be made again,
and names neither paths nor times.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2surgery.errors import refuse
from d2surgery.files.whole import write_whole
from d2surgery.formats import open_layout
from d2surgery.formats.layout import Layout
from d2surgery.kinds import TABLE

CARD = "README.md"
RECEIPT = "d2surgery_merge.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def write_card(directory: str | os.PathLike[str], *, verdict: str = "", base_model: str = "") -> Path:
    """README.md of a merged model or an adapter in a directory; what stands there already stays as it is.

    verdict: an audit's, where there was one. base_model: a hub id, where the output does not name its own. Raises
    D2SurgeryError for a directory that is neither, OSError where the system would not let us write.
    """
    path = Path(directory) / CARD
    if not path.exists():
        write_whole(path, card(directory, verdict=verdict, base_model=base_model))
    return path


def card(directory: str | os.PathLike[str], *, verdict: str = "", base_model: str = "") -> str:
    """The text of the card."""
    folder = Path(directory)
    receipt = folder / RECEIPT
    if receipt.exists():
        return of_merge(_read(receipt), verdict=verdict, base_model=base_model)
    layout = open_layout(folder)
    if not (layout.adapters or layout.replacements or layout.rows):
        raise refuse("NOT_AN_ADAPTER", "there is neither an adapter nor a merge's receipt", file=str(folder))
    return _of_adapter(layout, base_model)


def of_merge(receipt: Mapping[str, Any], *, verdict: str = "", base_model: str = "") -> str:
    """The text of the card of what a merge wrote with this receipt."""
    adapter, recipe = _mapping(receipt.get("adapter")), _mapping(receipt.get("recipe"))
    base = base_model or str(adapter.get("base_model") or "")
    hashed = _mapping(_mapping(receipt.get("outputs")).get("tensors"))
    facts = {
        "base": base or "not named by the adapter",
        "strength": recipe.get("strength", 1),
        "dtype": recipe.get("dtype") or "as in the base",
        **({"tensors": len(hashed)} if hashed else {}),
        "made by": f"d2surgery {receipt.get('d2surgery', '')}, torch {receipt.get('torch', '')}",
        "audit": verdict or "not run: `d2surgery audit --base BASE --adapter ADAPTER --merged .`",
    }
    matter = {"base_model": base, "base_model_relation": "merge", "library_name": "transformers"}
    how = (
        "A base model with an adapter merged into it: every weight is W0 + strength·delta, computed one precision "
        "above the stored one and rounded once."
    )
    if hashed:
        how += (
            f" `{RECEIPT}` has the sha256 of every tensor that went in and came out; "
            "`d2surgery audit --merged . --receipt` compares them."
        )
    return _text("Merged model", matter, ("merge", "d2surgery"), how, facts)


def _of_adapter(layout: Layout, base_model: str) -> str:
    base = base_model or layout.base_model or ""
    entries = layout.adapters.values()
    ranks = sorted({rank for entry in entries for rank in entry.ranks.values()})
    kinds = " and ".join(TABLE[kind].title for kind in layout.kinds) or "no adapter"
    facts: dict[str, Any] = {
        "base": base or "not named",
        "kind": kinds,
        "modules": len(layout.adapters),
        "rank": ", ".join(map(str, ranks)),
        "format": layout.format,
    }
    for step in layout.about.history:
        error = step.get("relative_error")
        lost = "exact" if step.get("exact") else f"relative error {error:.3g}" if isinstance(error, float) else ""
        facts[str(step.get("method"))] = f"by d2surgery {step.get('d2surgery')}{f', {lost}' if lost else ''}"
    loads = layout.format == "peft" and set(layout.kinds) <= {"lora", "dora"}
    matter = {"base_model": base, "base_model_relation": "adapter", "library_name": "peft" if loads else "d2surgery"}
    how = f"A {kinds} adapter. `d2surgery inspect .` says what it is, `d2surgery report .` shows what it does."
    return _text("Adapter", matter, (*layout.kinds, "adapter", "d2surgery"), how, facts)


def _text(title: str, matter: Mapping[str, str], tags: Sequence[str], how: str, facts: Mapping[str, Any]) -> str:
    lines = ["---"]
    for key, value in matter.items():
        if value and (key != "base_model" or _HUB_ID.fullmatch(value)):  # the hub refuses a card that names a path
            lines.append(f"{key}: {value}")
    if "base_model" not in {line.partition(":")[0] for line in lines}:
        lines = [line for line in lines if not line.startswith("base_model_relation")]
    lines += [
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(tags)),
        "---",
        "",
        f"# {title}",
        "",
        how,
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """A stranger's text in a table of Markdown: one line, no cell of its own, no markup of HTML, and no path."""
    text = str(value)
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    if re.match(r"(/|~|\.{1,2}/|[A-Za-z]:\\)", text):
        text = Path(text.replace("\\", "/")).name
    return text.replace("|", "\\|").replace("<", "&lt;")


def _read(receipt: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(receipt.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        raise refuse("BAD_CONFIG", "is no receipt", file=str(receipt), wanted="JSON as merge writes it") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
