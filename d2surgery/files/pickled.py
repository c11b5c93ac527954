"""Adapters saved by torch.save (`.bin`, `.pt`): names, shapes and tensors, never code."""

from pathlib import Path

import torch
from torch import Tensor

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.header import Header
from d2surgery.files.tensors import NAMES, header_of

_STATES = {  # the keys of what trainers leave beside an adapter -> what it is
    frozenset(("state", "param_groups")): "an optimizer's state",
    frozenset(("last_epoch", "base_lrs")): "a learning-rate scheduler's state",
}


def read_pickled_header(path: Path) -> Header:
    """Names, dtypes and shapes. Each tensor begins at 0: a pickle's tensors have no place of their own in the file.

    Raises D2SurgeryError PICKLE, as `read_pickled` does.
    """
    return header_of(read_pickled(path), path)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, mapped from the file where its form allows.

    Raises D2SurgeryError PICKLE when the file holds anything but dense tensors by name: other objects could run code.
    """
    try:
        loaded = _load(path)
    except FileNotFoundError:
        raise refuse("FILE_MISSING", "no such file", file=str(path)) from None
    except PermissionError as error:
        raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(path)) from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise refuse("PICKLE", f"PyTorch will not load it safely: {_reason(error)}", file=str(path)) from None
    if not isinstance(loaded, dict):
        got = type(loaded).__name__
        raise refuse("PICKLE", "not a table of tensors", file=str(path), wanted="names and tensors", got=got)
    if what := next((what for names, what in _STATES.items() if names <= loaded.keys()), None):
        raise refuse("NOT_AN_ADAPTER", f"the file is {what}", file=str(path))
    raise_errors(
        Problem(code="PICKLE", message=f"{name!r} is not a dense tensor", file=str(path), got=_kind(value))
        for name, value in loaded.items()
        if not (isinstance(name, str) and _is_plain(value))
    )
    return dict(loaded)


def _reason(error: Exception) -> str:
    """The line of PyTorch's message that names the object, not its advice to load unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "nsupported" in line), lines[0] if lines else type(error).__name__)[:200]


def _load(path: Path) -> object:
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except RuntimeError:  # before PyTorch 1.6 the file was no zip archive and cannot be mapped
        return torch.load(path, weights_only=True, map_location="cpu")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in NAMES


def _kind(value: object) -> str:
    return f"{value.layout}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
