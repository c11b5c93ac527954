"""Bytes on disk and torch tensors: dtypes by their safetensors names, positional reads, and rounding once."""

import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from d2surgery.errors import refuse
from d2surgery.files.header import Header, TensorInfo
from d2surgery.files.stored import read_stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Workspace(threading.local):
    """Memory of one thread, kept from one use to the next: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, purpose: str, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements, as the last use for this purpose left them."""
        nbytes = count * dtype.itemsize
        held = self._held.get(purpose)
        if held is None or held.numel() < nbytes:
            held = self._held[purpose] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype)


def read_part(info: TensorInfo, start: int, target: memoryview, *, once: bool = False) -> None:
    """Fill the buffer with a tensor's bytes from position `start` within it. `once` and errors: see `read_stored`."""
    if info.heads:
        _read_halves(info, start, target)
    else:
        _read_plain(info, start, target, once=once)
    if info.added and len(target):
        torch.frombuffer(target, dtype=DTYPES[info.dtype]).sub_(info.added)


def _read_plain(info: TensorInfo, start: int, target: memoryview, *, once: bool = False) -> None:
    if info.grid is None:
        read_stored(info, start, target, once=once)
    elif len(target):
        from d2surgery.files.grids import decoded  # which few need

        target[:] = decoded(info, start, len(target))


def _read_halves(info: TensorInfo, start: int, target: memoryview) -> None:
    """As if row (head, i, half) of the file lay at (head, half, i): of every head that the bytes are of, all of it."""
    size, rows, stop = info.nbytes // info.heads, info.shape[0] // info.heads, start + len(target)
    for head in range(start // size, -(-stop // size)):
        stored = torch.empty(size, dtype=torch.uint8)
        _read_plain(info, head * size, as_bytes(stored))
        ordered = as_bytes(stored.reshape(rows // 2, 2, -1).transpose(0, 1).contiguous())
        first, last = max(start, head * size), min(stop, (head + 1) * size)
        target[first - start : last - start] = ordered[first - head * size : last - head * size]


def read_rows(info: TensorInfo, start: int, stop: int, *, of: int) -> Tensor:
    """Rows `start` to `stop` of a tensor seen as a matrix of `of` rows: (stop - start, elements / of), as stored."""
    width = prod(info.shape) // of if of else prod(info.shape[1:])
    row_bytes = info.nbytes // max(of, 1)
    data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    if len(data):
        read_part(info, start * row_bytes, as_bytes(data))
    return data.view(DTYPES[info.dtype]).view(stop - start, width)


def read_tensor(info: TensorInfo) -> Tensor:
    """One whole tensor in its stored dtype."""
    return read_rows(info, 0, 1, of=1).reshape(info.shape)


def header_of(loaded: Mapping[str, Tensor], path: Path = Path()) -> Header:
    """The header of tensors at hand; `path` is where they come from, if anywhere."""
    tensors = {
        name: TensorInfo(path, NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in loaded.items()
    }
    return Header((path,), tensors, {}, loaded)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even, once. torch goes from float64 to a 16-bit dtype through float32 and rounds twice;
    rounding to odd in float32 first keeps what the second rounding needs to know (Boldo and Melquiond, 2008)."""
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    near = values.to(torch.float32)
    error = values - near.double()
    even = near.view(torch.int32) & 1 == 0
    toward = torch.copysign(torch.full_like(near, torch.inf), error.float())
    odd = torch.where((error != 0) & even & near.isfinite(), torch.nextafter(near, toward), near)
    return odd.to(dtype)


def find_device(name: str) -> torch.device:
    """The device of this name. Raises D2SurgeryError USAGE when torch cannot use it here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise refuse("USAGE", f"no such device here: {str(error).splitlines()[0]}", got=name) from None
