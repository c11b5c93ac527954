"""What torch.save wrote (`.bin`, `.pt`), adapters and models: names, shapes and tensors, never code."""

import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.header import Header, TensorInfo
from d2surgery.files.held import Held
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


def locate_pickled(path: Path) -> Header:
    """Names, dtypes, shapes and where each tensor's bytes lie, so that they are read as those of safetensors are.

    The file is a zip archive whose records, never compressed, are the memory of tensors: mapped, all lie as far apart
    in memory as in the file.

    Raises D2SurgeryError PICKLE as `read_pickled` does, and for the form of before PyTorch 1.6, which has no records.
    """
    try:
        held = Held(path)
    except OSError:
        held = None  # reading it says what is wrong
    loaded = read_pickled(path)
    if not zipfile.is_zipfile(path):
        message = "written by PyTorch before 1.6, whose form cannot be read in parts"
        raise refuse("PICKLE", message, file=str(path), wanted="safetensors, or saved again")
    records = _records(path)
    memories = {tensor.untyped_storage().data_ptr() for tensor in loaded.values() if tensor.numel()}
    ahead = min(records, default=0) - min(memories, default=0)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in loaded.items():
        start = tensor.data_ptr() + ahead if tensor.numel() else 0
        info = TensorInfo(path, NAMES[tensor.dtype], tuple(tensor.shape), start, start + tensor.nbytes, held)
        first = tensor.untyped_storage().data_ptr() + ahead
        if tensor.numel() and not (tensor.is_contiguous() and records.get(first) == tensor.untyped_storage().nbytes()):
            raise refuse("PICKLE", "not stored in one piece", file=str(path), module=name, wanted="saved again")
        tensors[name] = info
    return Header((path,), tensors, {}, seen=(held,) if held else ())


def _records(path: Path) -> dict[int, int]:
    """Where the memory of each tensor begins in the file -> how many bytes it is."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.filename.rpartition("/")[0].endswith("/data") and record.compress_type == zipfile.ZIP_STORED:
                file.seek(record.header_offset + 26)  # the lengths of its name and of what stands after that
                lengths = struct.unpack("<HH", file.read(4))
                found[record.header_offset + 30 + sum(lengths)] = record.file_size
    return {start: size for start, size in found.items() if size}


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
