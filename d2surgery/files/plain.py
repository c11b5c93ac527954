"""Records as the plain values that JSON has."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any


def plain(value: Any) -> Any:
    """Null for what is no finite number, lists for tensors and tuples, objects by field for records."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if hasattr(value, "tolist"):  # a tensor: this module does not import torch
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
