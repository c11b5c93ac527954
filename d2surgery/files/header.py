"""The safetensors header: read and checked before a byte of data is trusted, without torch.

    8 bytes   little-endian length n of the header
    n bytes   JSON: {"name": {"dtype", "shape", "data_offsets": [start, stop]}, …, "__metadata__": {str: str}}
    the rest  the tensors, back to back, without a gap

Several such files, or those of torch.save, may be one checkpoint: see `checkpoints`.
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2surgery.errors import D2SurgeryError, Problem, raise_errors, refuse
from d2surgery.files.hashing import Hashing
from d2surgery.files.held import Held, Seen
from d2surgery.files.reading import Twice, open_file, parse_json

if TYPE_CHECKING:  # names and shapes need no torch
    from torch import Tensor

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000
MAX_TENSORS = 150_000  # of a file; every expert of the largest models adapted by itself gives 140,000
_SHOWN = 100  # faults that are listed; a wrong file may have as many as tensors
INDEX = "model.safetensors.index.json"

_FORMATS = {  # dtype -> struct's letters
    "F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B",
}  # fmt: skip
_MAGICS = (  # (first bytes, code, what it is)
    (b"version https://git-lfs", "LFS_POINTER", "a Git LFS pointer"),
    (b"{", "NOT_AN_ADAPTER", "JSON, such as a config"),
    (b"PK\x03\x04", "NOT_SAFETENSORS", "a zip archive, perhaps a PyTorch .bin under another name"),
    (b"\x80\x02", "NOT_SAFETENSORS", "a pickle"),
    (b"GGUF", "NOT_SAFETENSORS", "a GGUF file"),
    (b"<", "NOT_SAFETENSORS", "a web page"),
)


class Grid(NamedTuple):
    """How a quantised tensor lies in its file: blocks along its rows, from `TensorInfo.start` on."""

    name: str  # Q4_K …; "MLX, 4 bits"
    block: int  # numbers that share a scale, or scales
    nbytes: int  # of a block
    bits: int  # of a number, without its scales
    scales: "TensorInfo | None" = None  # MLX's, where they are tensors of their own
    biases: "TensorInfo | None" = None


class TensorInfo(NamedTuple):
    """One tensor as its header gives it; `start` and `stop` are absolute byte offsets in `file`.

    A quantised one (`grid`) is read in float32, and is F32 here; `stop` is then where it would end.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    held: Held | None = None  # the file, where it has been kept open
    heads: int = 0  # that share its rows, each with its two halves interleaved: they are read one after the other
    added: float = 0.0  # what the file has more than the model in every number
    grid: Grid | None = None  # of a quantised one

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The names and shapes of one or several safetensors files, or of tensors at hand."""

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    loaded: "Mapping[str, Tensor] | None" = field(default=None, compare=False, repr=False)
    """The tensors themselves where they cannot be read one by one: of a pickle, or of no file at all."""
    problems: tuple[Problem, ...] = field(default=(), compare=False, repr=False)
    """Warnings of the directory: which of its files these are."""
    seen: tuple[Seen, ...] = field(default=(), compare=False, repr=False)
    """What it was read from, as it was then: the files of tensors held open, and an index beside them."""

    @cached_property
    def names(self) -> str:
        """The tensors' names and those of the metadata, a line break before and after each."""
        return "\n".join(("", *self.tensors, *self.metadata, ""))

    @cached_property
    def hashing(self) -> Hashing:
        """The sha256 of the files, which a thread begins to find when this is first asked for."""
        return Hashing(self.files)

    @property
    def usual_dtype(self) -> str | None:
        """The dtype of most floating-point tensors, not counting quantised ones; None where there are none."""
        count = Counter(info.dtype for info in self.tensors.values() if info.dtype in FLOATS and not info.grid)
        return count.most_common(1)[0][0] if count else None


def read_header(path: Path) -> Header:
    """Read and check the header of one file. Raises D2SurgeryError with every fault found."""
    try:
        held = Held(path)
        size = held.found.st_size
        head = held.read(64, 0)
        _check_magic(path, head, size)
        length = struct.unpack("<Q", head[:8])[0]
        _check_length(path, length, size)
        text = held.read(length, 8)
    except FileNotFoundError:
        raise refuse("FILE_MISSING", "no such file", file=str(path)) from None
    except OSError as error:
        raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(path)) from None
    entries, metadata = _parse(path, text)
    tensors = _checked(held, entries, 8 + length)
    return Header((path,), tensors, metadata, seen=(held,))


def small_values(header: Header, key: str) -> tuple[float, ...]:
    """The numbers of a small tensor, such as an alpha that is stored in the file, read without torch.

    Raises D2SurgeryError SHAPE_UNEXPECTED for more than 64 numbers or a dtype that is neither float nor integer.
    """
    info = header.tensors[key]
    if prod(info.shape) > 64 or info.dtype not in _FORMATS or info.grid:
        got = f"{info.dtype} {info.shape}"
        raise refuse("SHAPE_UNEXPECTED", "wanted a few numbers", file=str(info.file), module=key, got=got)
    if header.loaded is not None:
        return tuple(float(value) for value in header.loaded[key].reshape(-1).tolist())
    data = (info.held or Held(info.file)).read(info.nbytes, info.start)
    if len(data) != info.nbytes:
        raise refuse("TRUNCATED_FILE", "the file became shorter while it was read", file=str(info.file))
    if info.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
    return tuple(float(value) for (value,) in struct.iter_unpack(_FORMATS[info.dtype], data))


def is_pickle(path: Path) -> bool:
    """Does the file begin like one that torch.save wrote: a zip archive, or before PyTorch 1.6 a bare pickle?"""
    head = _head(path)
    return head.startswith((b"PK\x03\x04", b"\x80\x02")) and not (_begins_a_header(head) or _is_npz(head))


def is_gguf(path: Path) -> bool:
    return _head(path).startswith(b"GGUF")


def _head(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(64)
    except (OSError, D2SurgeryError):
        return b""  # whoever reads the file says why


def _check_magic(path: Path, head: bytes, size: int) -> None:
    if size == 0:
        raise refuse("FILE_EMPTY", "the file has no bytes", file=str(path))
    if _is_npz(head):
        raise refuse("NOT_SAFETENSORS", "the file is a NumPy archive (.npz)", file=str(path), wanted="safetensors")
    for magic, code, name in _MAGICS:
        if head.startswith(magic) and not _begins_a_header(head):
            raise refuse(code, f"the file is {name}", file=str(path), wanted="safetensors", got=f"{size} bytes")
    if size < 8:
        raise refuse("TRUNCATED_FILE", "shorter than any header", file=str(path), got=f"{size} bytes")


def _is_npz(head: bytes) -> bool:
    """A zip archive whose first entry is an array: PyTorch's begins with its pickle."""
    length = int.from_bytes(head[26:28], "little")  # of the entry's name, which stands at 30
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(b".npy")


def _begins_a_header(head: bytes) -> bool:
    """A length of 640 also begins like a pickle, and one of 60 like a web page; the brace tells."""
    return head[8:9] == b"{"


def _check_length(path: Path, length: int, size: int) -> None:
    if length > MAX_HEADER:
        raise refuse(
            "CORRUPT_HEADER",
            "the stated header length is absurd: not a safetensors file, or its first bytes are damaged",
            file=str(path),
            wanted=f"at most {MAX_HEADER} bytes",
            got=f"{length}",
        )
    if 8 + length > size:
        raise refuse(
            "TRUNCATED_FILE",
            "the file ends inside its header",
            file=str(path),
            wanted=f"at least {8 + length} bytes",
            got=f"{size}",
        )


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        entries = parse_json(text, groups=3 * MAX_TENSORS, parts=8 * MAX_TENSORS)
    except Twice as error:
        raise refuse("DUPLICATE_KEY", f"{error} in the header", file=str(path)) from None
    except ValueError as error:
        raise refuse("CORRUPT_HEADER", f"the header is not JSON: {error}", file=str(path)) from None
    if not isinstance(entries, dict):
        raise refuse("CORRUPT_HEADER", "wanted a JSON object", file=str(path), got=type(entries).__name__)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("CORRUPT_HEADER", "__metadata__ must map strings to strings", file=str(path))
    return entries, metadata


def _checked(held: Held, entries: dict[str, Any], data: int) -> dict[str, TensorInfo]:
    path, size = held.path, held.found.st_size
    problems: list[Problem] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            fault = _fault(dtype, shape, start, stop)
        except (TypeError, KeyError, ValueError):
            fault = "wanted dtype, shape and two data_offsets"
        if fault and len(problems) == _SHOWN:
            break
        if fault:
            problems.append(Problem(code="BAD_TENSOR_ENTRY", message=fault, file=str(path), module=name))
        else:
            tensors[name] = TensorInfo(path, dtype, shape, data + start, data + stop, held)
    position = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position and not problems:
            fault = "overlaps the tensor before it" if info.start < position else "leaves bytes nobody owns before it"
            problems.append(Problem(code="BAD_TENSOR_ENTRY", message=fault, file=str(path), module=name))
        position = max(position, info.stop)
    if position > size:
        problems.append(_size_problem("TRUNCATED_FILE", "the file ends before its tensors do", path, position, size))
    elif position < size and not problems:
        problems.append(_size_problem("BAD_TENSOR_ENTRY", "bytes after the last tensor", path, position, size))
    raise_errors(problems)
    return tensors


def _fault(dtype: Any, shape: tuple[Any, ...], start: Any, stop: Any) -> str:
    if dtype not in BITS:
        return f"unknown dtype {dtype!r}"
    counts = (*shape, start, stop)
    if {*map(type, counts)} != {int} or min(counts) < 0 or stop < start:
        return f"shape {shape} or offsets [{start}, {stop}] are not counts"
    want = prod(shape) * BITS[dtype] // 8
    return "" if stop - start == want else f"{dtype} {shape} needs {want} bytes, its offsets span {stop - start}"


def _size_problem(code: str, message: str, path: Path, want: int, got: int) -> Problem:
    return Problem(code=code, message=message, file=str(path), wanted=f"{want} bytes", got=f"{got}")
