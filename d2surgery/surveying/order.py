"""The order in which modules are shown: layer 2 before layer 10. No torch."""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key to sort names by: their numbers as numbers."""
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple((bool(at % 2), int(part) if at % 2 else 0, part) for at, part in enumerate(parts))


def in_order(modules: Mapping[str, Value]) -> dict[str, Value]:
    """By layer; within a layer, and of what is not numbered, as they came: q, k, v stay q, k, v."""
    came: dict[str, int] = {}
    keys = {
        name: tuple(number if digits else came.setdefault(text, len(came)) for digits, number, text in natural(name))
        for name in modules
    }
    return {name: modules[name] for name in sorted(modules, key=keys.__getitem__)}
