"""BaseWeights: rows of a tensor are those that numpy cuts out of the whole, and nothing else is read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2surgery import BaseWeights, D2SurgeryError
from d2surgery.files.tensors import read_part

EXPERTS, OUT, IN = 3, 5, 4


@pytest.fixture
def base(tmp_path: Path) -> BaseWeights:
    numbers = torch.arange(EXPERTS * OUT * IN)
    tensors = {
        "experts": numbers.reshape(EXPERTS, OUT, IN).bfloat16(),
        "linear": numbers.reshape(-1, IN).double(),
        "norm": numbers.float(),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, IN),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return BaseWeights(tmp_path)


@pytest.mark.parametrize(
    ("name", "of", "start", "stop"),
    [
        ("linear", None, 2, 7),
        ("linear", None, 0, EXPERTS * OUT),
        ("linear", None, 4, 4),
        ("linear", 5, 1, 3),
        ("experts", None, 1, 3),
        ("experts", EXPERTS * OUT, 4, 11),
        ("norm", None, 3, 9),
        ("norm", 1, 0, 1),
        ("scalar", None, 0, 1),
        ("empty", None, 0, 0),
    ],
)
def test_rows_are_those_of_the_whole_tensor(
    base: BaseWeights, name: str, of: int | None, start: int, stop: int
) -> None:
    whole = base[name]
    count = of if of is not None else (*whole.shape, 1)[0]
    wanted = whole.reshape(count, -1)[start:stop] if whole.numel() else whole
    found = base.rows(name, start, stop, of=of)
    assert found.dtype == whole.dtype
    assert torch.equal(found, wanted)


def test_only_the_rows_asked_for_are_read(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Sequence[Any], offset: int) -> int:
        read.append(preadv(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    base.rows("experts", OUT + 1, OUT + 3, of=EXPERTS * OUT)
    assert sum(read) == 2 * IN * 2


@pytest.mark.parametrize(("start", "stop", "of"), [(0, 16, None), (-1, 2, None), (3, 2, None), (0, 1, 7), (0, 1, 0)])
def test_rows_that_are_not_there_are_refused(base: BaseWeights, start: int, stop: int, of: int | None) -> None:
    with pytest.raises(D2SurgeryError, match="linear") as error:
        base.rows("linear", start, stop, of=of)
    assert error.value.problems[0].code == "USAGE"


@pytest.mark.parametrize("once", [False, True])
def test_a_part_of_a_tensor_is_its_bytes_from_a_position_within_it(base: BaseWeights, once: bool) -> None:
    target = bytearray(12)
    read_part(base.header.tensors["norm"], 20, memoryview(target), once=once)
    assert torch.frombuffer(target, dtype=torch.float32).tolist() == [5, 6, 7]


def test_the_usual_dtype_is_that_of_most_floating_point_tensors(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.ones(1, dtype=torch.float16) for i in range(2)}
    tensors |= {"w": torch.ones(9), **{f"i{i}": torch.ones(1, dtype=torch.int64) for i in range(5)}}
    save_file(tensors, tmp_path / "model.safetensors")
    assert BaseWeights(tmp_path).header.usual_dtype == "F16"


def test_without_floating_point_tensors_no_dtype_is_usual(tmp_path: Path) -> None:
    save_file({"i": torch.ones(1, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert BaseWeights(tmp_path).header.usual_dtype is None
