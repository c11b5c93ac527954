"""Bytes and tensors: rounding once, against numpy and against scaling by powers of two; reads that end early."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import safetensors_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from models import Array, f64, round_to

from d2surgery.errors import D2SurgeryError
from d2surgery.files.header import BITS, read_header
from d2surgery.files.stored import read_into
from d2surgery.files.tensors import DTYPES, as_bytes, read_tensor, rounded

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}


def right(values: torch.Tensor, dtype: str) -> Array:
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return np.asarray(values.numpy().astype(np.float16).astype(np.float64))
    with np.errstate(over="ignore"):
        nearest = round_to(f64(values), dtype)
    largest = float(torch.finfo(torch.bfloat16).max)
    return np.where(np.abs(nearest) > largest, np.copysign(np.inf, nearest), nearest)


def neighbours(pattern: int, dtype: torch.dtype) -> tuple[float, float]:
    """The finite number of 16 bits with this pattern and the next larger in size."""
    low, high = torch.tensor([pattern, pattern + 1], dtype=torch.int16).view(dtype).double().tolist()
    return low, high


LAST = {"F16": 0x7BFF, "BF16": 0x7F7F}  # the largest finite number


@given(st.sampled_from(["F16", "BF16"]), st.data(), st.booleans())
def test_around_every_midpoint_float64_is_rounded_once(dtype: str, data: st.DataObject, negative: bool) -> None:
    """Next to a midpoint, float32 is the midpoint itself and rounding a second time goes to even: the wrong way."""
    low, high = neighbours(data.draw(st.integers(0, LAST[dtype] - 1)), NARROW[dtype])
    middle = (low + high) / 2
    values = [
        middle,
        np.nextafter(middle, 0),
        np.nextafter(middle, np.inf),
        middle * (1 + 2**-30),
        middle * (1 - 2**-30),
    ]
    tensor = torch.tensor(values, dtype=torch.float64) * (-1 if negative else 1)
    assert (f64(rounded(tensor, NARROW[dtype])) == right(tensor, dtype)).all()


def test_rounding_twice_would_be_seen() -> None:
    low, high = neighbours(0x3F80, torch.bfloat16)
    tensor = torch.tensor([np.nextafter((low + high) / 2, 2)], dtype=torch.float64)
    assert float(rounded(tensor, torch.bfloat16)) == high
    assert float(tensor.float().bfloat16()) == low, "torch's own way, through float32"


@given(st.sampled_from(["F16", "BF16"]), st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
@example("BF16", [3.3961775292304957e38, 3.39e38, -1e300, 5e-324, 2.0**-134, 2.0**-133 * 1.5])
@example("F16", [65519.99999, 65520.0, 65504.0, 2.0**-25, 2.0**-25 * 1.0000001, 1e-300])
def test_any_float64_is_rounded_to_nearest_even(dtype: str, values: list[float]) -> None:
    tensor = torch.tensor([v for v in values if abs(v) < np.inf] or [0.0], dtype=torch.float64)
    got = rounded(tensor, NARROW[dtype])
    assert np.array_equal(f64(got), right(tensor, dtype))
    assert torch.equal(torch.signbit(got), torch.signbit(tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    got = rounded(torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], dtype=torch.float64), dtype)
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.isnan(got[2])
    assert torch.signbit(got[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_fits_is_unchanged(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(rounded(values.double(), dtype), values)
    assert torch.equal(rounded(values.float(), dtype), values.float().to(dtype))


def test_the_dtypes_have_the_widths_of_their_names() -> None:
    assert {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} == {name: BITS[name] for name in DTYPES}


def test_reading_past_the_end_says_so(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    fd = os.open(path, os.O_RDONLY)
    buffer = bytearray(4)
    try:
        read_into(fd, memoryview(buffer), 1)
        assert buffer == b"2345"
        with pytest.raises(D2SurgeryError) as error:
            read_into(fd, memoryview(buffer), 2)
    finally:
        os.close(fd)
    assert [problem.code for problem in error.value.problems] == ["TRUNCATED_FILE"]


def test_tensors_of_no_and_of_one_element_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"none": (0, 3), "one": ()}, {"one": "I64"}))
    header = read_header(path)
    assert read_tensor(header.tensors["none"]).shape == (0, 3)
    assert torch.equal(read_tensor(header.tensors["one"]), torch.tensor(0))


def test_bytes_are_the_memory_of_the_tensor_itself() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    as_bytes(tensor)[0:2] = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert float(tensor[0, 0]) == 1.5
    assert len(as_bytes(tensor)) == 12
