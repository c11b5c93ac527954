"""Quantised tensors: blocks of numbers on a grid, read as the float32 numbers that they stand for, and made again.

    GGUF         blocks along a row, each with its scales; Q8_0 is a float16 d and 32 signed bytes q: d·q. All others
                 are read by the Python package gguf
    MLX, affine  module.weight, of b bits each in one stream, low bits first, in uint32; module.scales and .biases
                 (out, in / group): scale·q + bias

Only the blocks that hold the numbers asked for are read.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from d2surgery.errors import refuse
from d2surgery.files.header import Grid, TensorInfo
from d2surgery.files.held import Held

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

EXACT = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""GGUF's types that need no search for their scales: gguf's quantiser gives llama.cpp's bytes (without an imatrix)."""


def decoded(info: TensorInfo, start: int, nbytes: int) -> memoryview:
    """Bytes `start` to `start + nbytes` of a quantised tensor as it is in float32.

    Raises D2SurgeryError NO_GGUF, TRUNCATED_FILE.
    """
    grid = info.grid
    assert grid is not None
    first = start // 4 // grid.block
    last = -(-(start + nbytes) // (4 * grid.block))
    values = _affine(info, grid, first, last) if grid.scales else _gguf(_bytes(info, first, last, grid.nbytes), grid)
    whole = memoryview(np.ascontiguousarray(values, np.float32).tobytes())
    begin = start - first * grid.block * 4
    return whole[begin : begin + nbytes]


def quantizes(grid: Grid) -> bool:
    """Whether `quantized` gives what the grid's own quantiser does."""
    return grid.scales is not None or grid.name in EXACT


def quantized(values: Tensor, grid: Grid) -> Tensor:
    """Whole blocks, flat, rounded to the grid and read from it again, in float32.

    values: in the dtype in which the quantiser is given them. Raises D2SurgeryError NO_GGUF.
    """
    if grid.scales is not None:
        return torch.flatten(_on_affine(values.reshape(-1, grid.block), grid))
    quants, types = _package()
    row = values.float().numpy().reshape(1, -1)  # gguf takes sixteen rows at a time
    with np.errstate(all="ignore"):  # a block of zeros
        again = quants.dequantize(quants.quantize(row, types[grid.name]), types[grid.name])
    return torch.flatten(torch.from_numpy(again))


def steps(values: Tensor, grid: Grid) -> Tensor:
    """No less than the distance of neighbouring numbers of the grid, per block of at most 32 (MLX: per group): of b
    bits 2·max|ŵ|/(2ᵇ − 1). values: from the grid, whole blocks; (blocks, 1)."""
    size = grid.block if grid.scales is not None else 32
    least = 2.0 ** (grid.bits - 24)  # a float16 scale below its smallest is zero
    return (values.reshape(-1, size).abs().amax(1, keepdim=True) * (2 / ((1 << grid.bits) - 1))).clamp(min=least)


def _package() -> tuple[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise refuse("NO_GGUF", "the package gguf is not installed") from None
    return quants, GGMLQuantizationType


def _bytes(info: TensorInfo, first: int, last: int, each: int) -> "Array":
    held, begin = info.held or Held(info.file), info.start + first * each
    data = held.read((last - first) * each, begin)
    if len(data) != (last - first) * each:
        raise refuse("TRUNCATED_FILE", "the file became shorter while it was read")
    return np.frombuffer(data, np.uint8).reshape(-1, each)


def _gguf(blocks: "Array", grid: Grid) -> "Array":
    if grid.name == "Q8_0":  # adapters have it, too
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return blocks[:, 2:].copy().view(np.int8).astype(np.float32) * scales
    quants, types = _package()
    values: Array = quants.dequantize(blocks.reshape(1, -1), types[grid.name])
    return values


def _affine(info: TensorInfo, grid: Grid, first: int, last: int) -> "Array":
    assert grid.scales is not None
    assert grid.biases is not None
    packed = _bytes(info, first, last, grid.nbytes)
    numbers = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), grid.block, grid.bits)
    powers = (1 << np.arange(grid.bits)).astype(np.float32)
    return (numbers @ powers) * _floats(grid.scales, first, last) + _floats(grid.biases, first, last)


def _floats(info: TensorInfo, first: int, last: int) -> "Array":
    each = info.nbytes // max(int(np.prod(info.shape)), 1)
    data = torch.from_numpy(_bytes(info, first, last, each).copy())
    values: Array = data.view(FLOAT[info.dtype]).float().numpy()
    return values


FLOAT = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What MLX's scales are stored in: the dtype of the weights that were quantised."""


def _on_affine(groups: Tensor, grid: Grid) -> Tensor:
    """mlx/backend/cpu/quantized.cpp: the larger end of a group is a point of the grid, in float32."""
    low, values = groups.dtype, groups.float()
    top = float(2**grid.bits - 1)
    least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    below = least.abs() > most.abs()
    scale = ((most - least) / top).clamp(min=1e-7)
    scale = torch.where(below, scale, -scale)
    edge = torch.where(below, least, most)
    at = (edge / scale).round()
    scale, bias = torch.where(at != 0, edge / at, scale), torch.where(at != 0, edge, 0)
    numbers = ((values - bias) / scale).round().clamp(0, top)
    return numbers * scale.to(low).float() + bias.to(low).float()
