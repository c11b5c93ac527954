"""The streaming writer: files that safetensors reads, tensors whole, what the disk lost is said."""

import errno
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2surgery.files.checkpoints import read_checkpoint_header
from d2surgery.files.tensors import NAMES
from d2surgery.files.writer import Entry, Shard, ShardWriter, hash_tensors, index_file, shards

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


def test_a_write_that_the_disk_lost_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shards([Entry("a", "U8", (64,), 64)], 10**9)
    monkeypatch.setattr("d2surgery.files.writer.FLUSH", 1)
    monkeypatch.setattr(os, "fdatasync", fail := Mock(side_effect=OSError(errno.EIO, "lost")))
    writer = ShardWriter(tmp_path / shard.file, shard, hashes=False, sync=True)
    writer.write("a", torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(OSError, match="lost"):
        writer.close()
    assert fail.call_count == 1


def test_several_threads_may_write_a_tensor_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is asked after every piece."""
    monkeypatch.setattr("d2surgery.files.writer.FLUSH", 1)
    before = threading.enumerate()
    tensors = {
        f"t{i}": torch.randint(256, (1000,), generator=torch.Generator().manual_seed(i)).byte() for i in range(8)
    }
    (shard,) = shards(entries(tensors), 10**9)
    writer = ShardWriter(tmp_path / shard.file, shard, hashes=True, sync=True)

    def write(name: str) -> None:
        for piece in torch.split(tensors[name], 10):
            writer.write(name, piece)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, tensors))
    found = writer.close()
    assert threading.enumerate() == before
    assert found == {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / shard.file).items())
