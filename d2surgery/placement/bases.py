"""Is the base that is given the one that the adapter's config names? By names alone, where both are known."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem

_SAME = frozenset((
    "bnb", "4bit", "8bit", "nf4", "int4", "int8", "fp16", "bf16", "hf", "gptq", "awq", "unsloth", "dynamic",
    "quantized",
))  # fmt: skip
"""Words of a name that say how the same weights are stored, or nothing."""
_SIZE = re.compile(r"\d+(\.\d+)?[bm]")


def other_base(named: str | None, directory: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """A warning where every name that the base is known by differs from the one in the adapter's config."""
    wanted = _words(named or "")
    names = (config.get("_name_or_path"), _of_directory(directory))
    known = [str(name) for name in names if _is_name(name)]
    if not _is_name(named) or not known or any(_words(name) == wanted for name in known):
        return
    message = "the config names another base than the one given"
    yield Problem(
        code="OTHER_BASE_NAMED", severity="warning", message=message, wanted=str(named), got=" or ".join(known)
    )


def _of_directory(directory: Path) -> str:
    """A directory's own name, or of a snapshot in the hub's cache the repository's."""
    repository = next((part for part in directory.resolve().parts if part.startswith("models--")), "")
    return "/".join(repository.split("--")[1:]) or directory.resolve().name


def _is_name(name: object) -> bool:
    """Whether it says which model it is: by a size, as in Llama-3.1-8B."""
    return isinstance(name, str) and any(_SIZE.fullmatch(word) for word in _words(name))


def _words(name: str) -> frozenset[str]:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return frozenset(word for word in re.split(r"[-_ ]+", last.removeprefix("meta-")) if word) - _SAME
