"""The quantised modules of a model that MLX-LM wrote, as float32 tensors under transformers' names.

    module.weight   uint32 (out, in·bits/32)    in a stream of numbers of so many bits
    module.scales, module.biases   (out, in/group_size)

config.json says `quantization`: {"group_size", "bits"}, for single modules {"group_size", "bits"} under their names.
Only `mode` affine: the others (mxfp4, nvfp4, mxfp8) have no biases, and stay the bytes that they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from d2surgery.files.header import Grid, Header, TensorInfo

FIELDS = ("quantization", "quantization_config")
"""Of config.json, both by MLX-LM and the same; transformers' own has a quant_method."""


def dequantized(header: Header, config: Mapping[str, Any]) -> Header:
    """The header with a tensor in float32 for every such module; as it is where there is none."""
    tensors, said = dict(header.tensors), config.get(FIELDS[0])
    for name in header.tensors:
        module = name.removesuffix(".weight")
        scales, biases = (header.tensors.get(f"{module}.{leaf}") for leaf in ("scales", "biases"))
        if module == name or not isinstance(said, Mapping) or scales is None or biases is None:
            continue
        if (read := _read(header.tensors[name], scales, biases, {**said, **_own(said, module)})) is not None:
            tensors[name] = read
            del tensors[f"{module}.scales"], tensors[f"{module}.biases"]
    return replace(header, tensors=tensors)


def _own(said: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    own = said.get(module)
    return own if isinstance(own, Mapping) else {}


def _read(weight: TensorInfo, scales: TensorInfo, biases: TensorInfo, said: Mapping[str, Any]) -> TensorInfo | None:
    """None where the shapes are not those of so many bits."""
    bits, group = said.get("bits"), said.get("group_size")
    if bits not in (2, 3, 4, 5, 6, 8) or group not in (16, 32, 64, 128) or said.get("mode", "affine") != "affine":
        return None
    *rows, words = weight.shape or (0,)
    width = words * 32 // bits
    shape = (*rows, width // group)
    if weight.dtype != "U32" or width % group or (scales.shape, biases.shape) != (shape, shape):
        return None
    if scales.dtype != biases.dtype or scales.dtype not in ("F32", "F16", "BF16"):
        return None
    grid = Grid(f"MLX, {bits} bits", group, group * bits // 8, bits, scales, biases)
    whole = (*rows, width)
    size = 4 * scales.nbytes // {"F32": 4}.get(scales.dtype, 2) * group
    return weight._replace(dtype="F32", shape=whole, stop=weight.start + size, grid=grid)
