"""GGUF: what llama.cpp reads. The header by names, shapes and places, without NumPy; and a file of tensors written.

    "GGUF", version (u32), number of tensors (u64), number of fields (u64)
    field:   name, type (u32), value;  a string is its length (u64) and UTF-8; an array its type, its length, its values
    tensor:  name, number of sizes (u32), the sizes (u64, fastest first), type (u32), where it begins (u64)
    then, on multiples of general.alignment (32), the tensors

Shapes are torch's here: slowest first. Quantised tensors are read in float32 (`grids`).
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from d2surgery.errors import refuse
from d2surgery.files.header import MAX_TENSORS, Grid, Header, TensorInfo
from d2surgery.files.held import Held

TYPES = {0: ("F32", 4), 1: ("F16", 2), 28: ("F64", 8), 30: ("BF16", 2)}  # ggml's number -> dtype, bytes
GRIDS = {  # ggml's number -> name, numbers in a block, its bytes
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _FLOAT, _UINT = 8, 9, 6, 4
_ALIGNMENT, _MAX_HEADER = 32, 50_000_000

Field = str | int | float


class Part(NamedTuple):
    """A tensor to be written: its ggml type, its shape, its bytes when they are due."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: Callable[[], bytes]


def read_gguf(path: Path) -> Header:
    """The header of a file. Raises D2SurgeryError CORRUPT_HEADER, TRUNCATED_FILE, DUPLICATE_KEY."""
    held = Held(path)
    cursor = _Cursor(held, path)
    try:
        version, tensors, fields = cursor.take("<4xIQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        if tensors > MAX_TENSORS or fields > MAX_TENSORS:
            raise ValueError(f"{tensors} tensors, {fields} fields")
        metadata = dict(cursor.field() for _ in range(fields))
        infos = [cursor.tensor() for _ in range(tensors)]
        start = _aligned(cursor.at, int(metadata.get("general.alignment", _ALIGNMENT)))
    except (ValueError, struct.error, UnicodeDecodeError, KeyError, RecursionError) as error:
        raise refuse("CORRUPT_HEADER", f"not to be read as GGUF: {error}", file=str(path)) from None
    found: dict[str, TensorInfo] = {}
    for name, shape, type, offset in infos:
        dtype, nbytes = _size(type, shape)
        begin = start + offset
        if name in found:
            raise refuse("DUPLICATE_KEY", f"{name} in the header", file=str(path))
        if dtype == "":
            raise refuse("DTYPE_UNEXPECTED", f"ggml type {type}", file=str(path), module=name, wanted="F32 … NVFP4")
        if begin + nbytes > held.found.st_size:
            raise refuse("TRUNCATED_FILE", "the file ends before its tensors do", file=str(path), module=name)
        grid = _grid(type)
        size = nbytes if grid is None else 4 * prod(shape)
        found[name] = TensorInfo(path, dtype, shape, begin, begin + size, held, grid=grid)
    return Header((path,), found, metadata, seen=(held,))


class _Cursor:
    """A place in the header that moves on as it is read."""

    def __init__(self, held: Held, path: Path) -> None:
        self.data, self.at = held.read(min(held.found.st_size, _MAX_HEADER), 0), 0

    def take(self, format: str) -> tuple[int, ...]:
        values = struct.unpack_from(format, self.data, self.at)
        self.at += struct.calcsize(format)
        return values

    def text(self) -> str:
        (length,) = self.take("<Q")
        if length > len(self.data) - self.at:
            raise ValueError("a name is longer than the file")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def field(self) -> tuple[str, str]:
        name = self.text()
        (type,) = self.take("<I")
        return name, self.value(type)

    def value(self, type: int) -> str:
        if type == _STRING:
            return self.text()
        if type != _ARRAY:
            return str(self.take(_SCALARS[type])[0])
        inner, count = self.take("<IQ")
        if count > len(self.data) - self.at:
            raise ValueError("an array is longer than the file")
        if inner in _SCALARS:
            self.at += count * struct.calcsize(_SCALARS[inner])
        else:
            for _ in range(count):
                self.value(inner)
        return f"{count} values"

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (dims,) = self.take("<I")
        if dims > 8:
            raise ValueError(f"{name} has {dims} dimensions")
        sizes = self.take(f"<{dims}Q")
        type, offset = self.take("<IQ")
        return name, sizes[::-1], type, offset


def _grid(type: int) -> Grid | None:
    if type not in GRIDS:
        return None
    name, block, nbytes = GRIDS[type]
    return Grid(name, block, nbytes, next(int(letter) for letter in name if letter.isdecimal()))


def _size(type: int, shape: Sequence[int]) -> tuple[str, int]:
    if (grid := _grid(type)) is not None:
        whole = shape and shape[-1] % grid.block == 0
        return ("F32", prod(shape) // grid.block * grid.nbytes) if whole else ("", 0)
    dtype, each = TYPES.get(type, ("", 0))
    return dtype, prod(shape) * each


def _aligned(at: int, alignment: int) -> int:
    if not 0 < alignment <= 1 << 20:
        raise ValueError(f"alignment {alignment}")
    return at + -at % alignment


def gguf_bytes(fields: Mapping[str, Field], parts: Sequence[Part]) -> Iterator[bytes]:
    """A file of version 3, piece by piece."""
    head, offset = [struct.pack("<4sIQQ", b"GGUF", 3, len(parts), len(fields))], 0
    for name, value in fields.items():
        head.append(_text(name) + _packed(value))
    for part in parts:
        sizes = part.shape[::-1]
        head.append(_text(part.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, part.type, offset))
        offset = _aligned(offset + _size(part.type, part.shape)[1], _ALIGNMENT)
    start = sum(map(len, head))
    yield b"".join(head) + bytes(_aligned(start, _ALIGNMENT) - start)
    for part in parts:
        data = part.data()
        yield data + bytes(-len(data) % _ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(value: Field) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    kind, letter = (_UINT, "I") if isinstance(value, int) else (_FLOAT, "f")
    return struct.pack(f"<I{letter}", kind, value)
