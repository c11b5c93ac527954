"""The streaming writer: files that safetensors reads, tensors whole, stages in order, errors that stop all of them."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from d2surgery.header import read_checkpoint_header
from d2surgery.merging.writer import Entry, Shard, ShardWriter, hash_tensors, index_file, shards
from d2surgery.tensors import NAMES
from d2surgery.threads import pipeline

TENSORS = {
    "a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "odd": torch.arange(7, dtype=torch.uint8),
    "b": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "wide": torch.randn(3, generator=torch.Generator().manual_seed(2)).double(),
    "number": torch.tensor(7),
    "none": torch.empty(0, 4),
    "flag": torch.tensor([True, False, True]),
}


def entries(tensors: dict[str, Tensor] = TENSORS) -> list[Entry]:
    return [Entry(name, NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]


def fill(directory: Path, shard: Shard, *, hashes: bool = True) -> dict[str, str]:
    writer = ShardWriter(directory / shard.file, shard, hashes=hashes, sync=False)
    for entry in shard.entries:
        writer.write(entry.name, TENSORS[entry.name])
    return writer.close()


@pytest.mark.parametrize("limit", [1, 40, 100, 10**9])
def test_safetensors_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    files = shards(entries(), limit)
    for shard in files:
        fill(tmp_path, shard)
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        assert sum(entry.nbytes for entry in shard.entries) <= limit or len(shard.entries) == 1 or limit < 40
    read = {name: tensor for shard in files for name, tensor in load_file(tmp_path / shard.file).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    if index := index_file(files):
        ((name, content),) = index.items()
        (tmp_path / name).write_bytes(content)
        written = json.loads(content)
        assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert written["weight_map"] == {e.name: shard.file for shard in files for e in shard.entries}
    else:
        assert [shard.file for shard in files] == ["model.safetensors"]
    assert read_checkpoint_header(tmp_path).tensors.keys() == TENSORS.keys()


def test_every_tensor_starts_at_a_multiple_of_its_item_size() -> None:
    (shard,) = shards(entries(), 10**9)
    assert len(shard.header) % 8 == 0
    assert all(shard.starts[name] % tensor.element_size() == 0 for name, tensor in TENSORS.items())


def test_hashes_are_those_of_the_bytes_and_read_back_alike(tmp_path: Path) -> None:
    (shard,) = shards(entries(), 10**9)
    want = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in TENSORS.items()
    }
    assert fill(tmp_path, shard) == want
    assert hash_tensors(tmp_path / shard.file, shard) == want
    (tmp_path / shard.file).unlink()
    assert fill(tmp_path, shard, hashes=False) == {}


def test_pieces_of_a_tensor_follow_each_other(tmp_path: Path) -> None:
    (shard,) = shards(entries(), 10**9)
    writer = ShardWriter(tmp_path / shard.file, shard, hashes=False, sync=True)
    for part in range(0, 5, 2):
        for name, tensor in TENSORS.items():
            rows = tensor.reshape(-1)
            writer.write(name, rows[part * 4 : part * 4 + 8])
    writer.close()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / shard.file).items())


@pytest.mark.parametrize("pieces", [[], [TENSORS["a"][:4]], [TENSORS["a"], TENSORS["a"][:1]]])
def test_a_tensor_that_was_not_written_to_its_last_byte_is_an_error(tmp_path: Path, pieces: list[Tensor]) -> None:
    (shard,) = shards(entries({"a": TENSORS["a"]}), 10**9)
    writer = ShardWriter(tmp_path / shard.file, shard, hashes=False, sync=False)
    for piece in pieces:
        writer.write("a", piece)
    with pytest.raises(RuntimeError, match=r"a$"):
        writer.close()


# The pipeline ---------------------------------------------------------------------------------------------------------


def run(
    items: list[int], buffers: int, fail: dict[str, int], stop: type[BaseException] = ValueError
) -> list[tuple[int, int]]:
    """Items through three stages, each of which may fail at one item; what was written, with the value computed."""
    written: list[tuple[int, int]] = []

    def trip(stage: str, item: int) -> None:
        if fail.get(stage) == item:
            raise stop(f"{stage} {item}")

    def read(item: int, buffer: Tensor) -> None:
        trip("read", item)
        buffer.fill_(item)

    def compute(item: int, buffer: Tensor) -> Tensor | None:
        trip("compute", item)
        assert int(buffer[0]) == item, "the buffer was filled again before it was free"
        return buffer.mul_(2) if item % 3 else None

    def write(item: int, result: Tensor) -> None:
        trip("write", item)
        written.append((item, int(result[0])))

    pipeline(items, read, compute, write, [torch.zeros(4, dtype=torch.int64) for _ in range(buffers)])
    return written


@given(st.lists(st.integers(0, 10**6), max_size=40), st.integers(1, 5))
def test_everything_is_written_once_and_in_order(items: list[int], buffers: int) -> None:
    assert run(items, buffers, {}) == [(item, 2 * item) for item in items if item % 3]


@given(st.sampled_from(["read", "compute", "write"]), st.integers(1, 20), st.integers(1, 5))
def test_an_error_of_any_stage_is_raised_and_leaves_no_thread(stage: str, at: int, buffers: int) -> None:
    at = at if stage != "write" or at % 3 else at + 1
    before = threading.enumerate()
    with pytest.raises(ValueError, match=f"{stage} {at}$"):
        run(list(range(30)), buffers, {stage: at})
    assert threading.enumerate() == before


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_interrupt_stops_all_stages(stage: str) -> None:
    before = threading.enumerate()
    with pytest.raises(KeyboardInterrupt):
        run(list(range(30)), 2, {stage: 7}, KeyboardInterrupt)
    assert threading.enumerate() == before


def test_an_error_of_the_items_themselves_is_raised() -> None:
    def items() -> Any:
        yield 1
        raise ValueError("no more")

    before = threading.enumerate()
    with pytest.raises(ValueError, match="no more"):
        pipeline(items(), lambda i, b: None, lambda i, b: b, lambda i, r: None, [torch.zeros(1)])
    assert threading.enumerate() == before


def test_a_write_that_the_disk_lost_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shards([Entry("a", "U8", (64,), 64)], 10**9)
    monkeypatch.setattr("d2surgery.merging.writer.FLUSH", 1)
    monkeypatch.setattr(os, "fdatasync", fail := Mock(side_effect=OSError(errno.EIO, "lost")))
    writer = ShardWriter(tmp_path / shard.file, shard, hashes=False, sync=True)
    writer.write("a", torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(OSError, match="lost"):
        writer.close()
    assert fail.call_count == 1
