"""A NumPy archive (.npz) by names, shapes and places in the file, without NumPy.

A zip archive whose entries are .npy files, each a tensor under its own name; stored, as numpy.savez and mlx.savez do.

    .npy: "\\x93NUMPY", version (2 bytes), length of the description (2 or 4 bytes), the description
    {'descr': '<f4', 'fortran_order': False, 'shape': (4, 8), }, then the numbers
"""

import ast
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import NoReturn

from d2surgery.errors import refuse
from d2surgery.files.header import BITS, MAX_TENSORS, Header, TensorInfo
from d2surgery.files.held import Held

_DTYPES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "V2": "BF16",
}  # as mlx stores it
_LONGEST = 10_000  # bytes of a description


def read_npz(path: Path) -> Header:
    """The header of an archive. Raises D2SurgeryError BAD_TENSOR_ENTRY for an entry that is no stored array."""
    try:
        held = Held(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise refuse("CORRUPT_HEADER", f"not to be read as a zip archive: {error}", file=str(path)) from None
    if len(entries) > MAX_TENSORS:
        raise refuse("CORRUPT_HEADER", "too many entries", file=str(path), got=str(len(entries)))
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in tensors:
            raise refuse("DUPLICATE_KEY", f"{name} stands twice", file=str(path))
        tensors[name] = _tensor(held, entry, name)
    return Header((path,), tensors, {}, seen=(held,))


def _tensor(held: Held, entry: zipfile.ZipInfo, name: str) -> TensorInfo:
    def bad(why: str) -> NoReturn:
        raise refuse("BAD_TENSOR_ENTRY", why, file=str(held.path), module=name)

    if not entry.filename.endswith(".npy") or entry.compress_type != zipfile.ZIP_STORED:
        bad("not an array that is stored as it is")
    if not 0 <= entry.header_offset < held.found.st_size:
        bad("the archive does not hold it where it says")
    local = held.read(30, entry.header_offset)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        bad("the archive does not hold it where it says")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    head = held.read(min(entry.file_size, 12), start)
    if head[:6] != b"\x93NUMPY" or head[6:7] not in (b"\1", b"\2", b"\3"):
        bad("not a .npy file")
    wide = head[6] > 1
    length = int.from_bytes(head[8 : 12 if wide else 10], "little")
    data = start + (12 if wide else 10) + length
    if length > _LONGEST:
        bad("its description is too long")
    try:
        said = ast.literal_eval(held.read(length, start + (12 if wide else 10)).decode())
        descr, shape, turned = said["descr"], tuple(said["shape"]), said["fortran_order"]
        dtype = _DTYPES[descr[1:]]
        fits = descr[0] in "<|" and all(type(n) is int and n >= 0 for n in shape)
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError, RecursionError, MemoryError):
        bad("its description cannot be read")
    nbytes = prod(shape) * BITS[dtype] // 8 if fits else -1
    if not fits or (turned and len(shape) > 1) or data + nbytes > start + entry.file_size:
        bad(f"{descr} {shape} is not what it holds")
    if data + nbytes > held.found.st_size:
        raise refuse("TRUNCATED_FILE", "the file ends before its tensors do", file=str(held.path))
    return TensorInfo(held.path, dtype, shape, data, data + nbytes, held)
