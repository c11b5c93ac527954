"""What torch.save wrote (`.bin`, `.pt`), adapters and models: names, shapes and tensors, never code.

    since PyTorch 1.6   a zip archive: NAME/data.pkl, the pickle; NAME/data/KEY, the memory of a storage, as it is
    before              five pickles (a number, a version, the system, the tensors, the keys of their storages),
                        then of each storage how many elements it has, 8 bytes, and its memory

The pickle is read by `unpickling`, not run. Every record must be what the pickle says, to the byte: torch itself, which
maps the file, does not look.
"""

import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from d2surgery.errors import D2SurgeryError, Problem, raise_errors, refuse
from d2surgery.files.header import BITS, Header, TensorInfo
from d2surgery.files.held import Held
from d2surgery.files.tensors import DTYPES, header_of
from d2surgery.files.unpickling import Storage, Stored, unpickle

_STATES = {  # the keys of what trainers leave beside an adapter -> what it is
    frozenset(("state", "param_groups")): "an optimizer's state",
    frozenset(("last_epoch", "base_lrs")): "a learning-rate scheduler's state",
}
_LEGACY = 0x1950A86A20F9469CFC6C  # the number that the form of before 1.6 begins with
_MAX_PICKLE, _MAX_DIRECTORY = 64_000_000, 16_000_000  # bytes of the pickle and of the archive's table


def read_pickled_header(path: Path) -> Header:
    """Names, dtypes and shapes. Each tensor begins at 0: a pickle's tensors have no place of their own in the file.

    Raises D2SurgeryError PICKLE, as `read_pickled` does.
    """
    return header_of(read_pickled(path), path)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, mapped from the file.

    Raises D2SurgeryError PICKLE when the file holds anything but dense tensors by name, or less of them than it says.
    """
    contents = _contents(path)
    memory = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=contents.held.found.st_size)
    return {name: contents.tensor(stored, memory) for name, stored in contents.tensors.items()}


def locate_pickled(path: Path) -> Header:
    """Names, dtypes, shapes and where each tensor's bytes lie, so that they are read as those of safetensors are.

    Raises D2SurgeryError PICKLE as `read_pickled` does, and for tensors that are not stored in one piece.
    """
    contents = _contents(path)
    if contents.legacy:
        message = "written by PyTorch before 1.6, whose form is not read in parts"
        raise refuse("PICKLE", message, file=str(path), wanted="safetensors, or saved again")
    tensors: dict[str, TensorInfo] = {}
    for name, stored in contents.tensors.items():
        nbytes = prod(stored.shape) * BITS[stored.dtype] // 8
        start = contents.starts[stored.storage.key] + stored.offset * BITS[stored.dtype] // 8 if nbytes else 0
        if not _is_contiguous(stored):
            raise refuse("PICKLE", "not stored in one piece", file=str(path), module=name, wanted="saved again")
        tensors[name] = TensorInfo(path, stored.dtype, stored.shape, start, start + nbytes, contents.held)
    return Header((path,), tensors, {}, seen=(contents.held,))


class _Contents(NamedTuple):
    """The tensors of a file and where in it their storages begin."""

    tensors: Mapping[str, Stored]
    starts: Mapping[str, int]  # by the storage's key
    held: Held
    legacy: bool

    def tensor(self, stored: Stored, memory: Any) -> Tensor:
        start = self.starts[stored.storage.key]
        own = memory[start : start + _nbytes(stored.storage)]
        empty = torch.empty(0, dtype=DTYPES[stored.dtype])
        return empty.set_(own, stored.offset, stored.shape, stored.stride)


def _contents(path: Path) -> _Contents:
    """All that is said of the tensors, checked."""
    try:
        held = Held(path)
        with os.fdopen(os.dup(held.fd), "rb") as file:
            legacy = file.read(2) != b"PK"
            said, records = (_read_legacy if legacy else _read_archive)(file, held.found.st_size)
    except FileNotFoundError:
        raise refuse("FILE_MISSING", "no such file", file=str(path)) from None
    except (ValueError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise refuse("PICKLE", f"not the tensors of torch.save: {str(error)[:200]}", file=str(path)) from None
    except OSError as error:
        raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(path)) from None
    tensors = _dense(path, said)
    raise_errors(
        Problem(code="PICKLE", message=fault, file=str(path), module=name)
        for name, stored in tensors.items()
        if (fault := _fault(stored, records))
    )
    return _Contents(tensors, {key: start for key, (start, _) in records.items()}, held, legacy)


def _dense(path: Path, said: Any) -> dict[str, Stored]:
    if isinstance(said, dict) and said.keys() == {"model"} and isinstance(said["model"], dict):
        said = said["model"]  # as litgpt saves them
    if not isinstance(said, dict):
        got = type(said).__name__
        raise refuse("PICKLE", "not a table of tensors", file=str(path), wanted="names and tensors", got=got)
    if what := next((what for names, what in _STATES.items() if names <= said.keys()), None):
        raise refuse("NOT_AN_ADAPTER", f"the file is {what}", file=str(path))
    problems = [
        Problem(code="PICKLE", message=f"{name!r} is not a dense tensor", file=str(path), got=_kind(value))
        for name, value in said.items()
        if not (isinstance(name, str) and isinstance(value, Stored) and value.dtype in DTYPES)
    ]
    if problems:
        raise D2SurgeryError(*problems[:100])
    return said


def _fault(stored: Stored, records: Mapping[str, tuple[int, int]]) -> str:
    """What a tensor says of its storage, or the storage of its record, that is not so."""
    nbytes = _nbytes(stored.storage)
    if stored.storage.key not in records:
        return "the memory it lies in is not in the file"
    if (held := records[stored.storage.key][1]) != nbytes:
        return f"the memory it lies in has {held} bytes and should have {nbytes}"
    if stored.storage.dtype not in ("", stored.dtype):
        return f"{stored.dtype} in memory of {stored.storage.dtype}"
    elements, count = nbytes * 8 // BITS[stored.dtype], prod(stored.shape)
    steps = zip(stored.shape, stored.stride, strict=True)
    last = stored.offset + sum((size - 1) * step for size, step in steps)
    if count > elements or (count and last >= elements) or stored.offset > elements:
        return f"shape {stored.shape} from {stored.offset} on leaves its memory of {elements} elements"[:200]
    return ""


def _nbytes(storage: Storage) -> int:
    return storage.elements * (BITS.get(storage.dtype, 8) if storage.dtype else 8) // 8


def _is_contiguous(stored: Stored) -> bool:
    step = 1
    for size, stride in zip(reversed(stored.shape), reversed(stored.stride), strict=True):
        if size > 1 and stride != step:
            return 0 in stored.shape
        step *= size
    return True


def _kind(value: object) -> str:
    return value.dtype if isinstance(value, Stored) else type(value).__name__


# The archive ----------------------------------------------------------------------------------------------------------


def _read_archive(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What the pickle says, and of each storage where its record begins and how many bytes it has."""
    if _directory_size(file, size) > _MAX_DIRECTORY:
        raise ValueError("its table of contents is too large")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two records have one name")
        spans = {name: _span(file, entry, size) for name, entry in entries.items()}
    end = 0
    for name, (start, nbytes) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:
            raise ValueError(f"the record {name} lies in another")
        end = start + nbytes
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("no data.pkl in it")
    root = pickles[0].partition("/")[0]
    if f"{root}/byteorder" in spans and _record(file, spans[f"{root}/byteorder"]) != b"little":
        raise ValueError("written on a machine whose numbers begin with the highest byte")
    said, _ = unpickle(_record(file, spans[pickles[0]]))
    return said, {name.removeprefix(f"{root}/data/"): span for name, span in spans.items()}


def _span(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where a record lies; not one that is compressed, cut, or other than the archive's table has it."""
    file.seek(entry.header_offset)
    sign, _, flags, method, *_, name, extra = struct.unpack("<IHHHHHIIIHH", file.read(30))
    start = entry.header_offset + 30 + name + extra
    if entry.compress_type != zipfile.ZIP_STORED or method != zipfile.ZIP_STORED or flags & 1:
        raise ValueError(f"the record {entry.filename} is compressed or locked, which torch.save never does")
    if sign != 0x04034B50 or entry.compress_size != entry.file_size or start + entry.file_size > size:
        raise ValueError(f"the record {entry.filename} is cut or does not begin where it should")
    if file.read(name) != entry.orig_filename.encode("utf-8" if flags & 0x800 else "cp437"):
        raise ValueError(f"the record {entry.filename} has another name where it begins")
    return start, entry.file_size


def _record(file: BinaryIO, span: tuple[int, int]) -> bytes:
    start, nbytes = span
    if nbytes > _MAX_PICKLE:
        raise ValueError(f"a pickle of {nbytes} bytes")
    file.seek(start)
    return file.read(nbytes)


def _directory_size(file: BinaryIO, size: int) -> int:
    """Of the archive's table, by its last record, before it is read."""
    file.seek(max(size - 66_000, 0))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("the archive has no end: the file is cut")
    (nbytes,) = struct.unpack_from("<I", tail, end + 12)
    further = tail.rfind(b"PK\6\6", 0, end)
    if nbytes == 0xFFFFFFFF and further >= 0:
        (nbytes,) = struct.unpack_from("<Q", tail, further + 40)
    return int(nbytes)


# The form of before 1.6 -----------------------------------------------------------------------------------------------


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_archive`."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        number, at = unpickle(data)
        if number != _LEGACY:
            raise ValueError("it does not begin like torch.save's")
        _, at = unpickle(data, at)
        system, at = unpickle(data, at)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("written on a machine whose numbers begin with the highest byte")
        said, at = unpickle(data, at)
        keys, at = unpickle(data, at)
        tensors = said.values() if isinstance(said, dict) else ()
        storages = {tensor.storage.key: tensor.storage for tensor in tensors if isinstance(tensor, Stored)}
        spans: dict[str, tuple[int, int]] = {}
        for key in keys if isinstance(keys, list) else ():
            if key not in storages:
                raise ValueError("it holds memory that no tensor by name lies in")
            (count,) = struct.unpack("<Q", data[at : at + 8])
            nbytes = _nbytes(storages[key])
            if count != storages[key].elements or at + 8 + nbytes > size:
                raise ValueError(f"the memory {key} is cut")
            spans[key] = (at + 8, nbytes)
            at += 8 + nbytes
    return said, spans
