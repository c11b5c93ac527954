"""Hashing while something else is imported: right digests, an end when asked, no thread left behind."""

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d2surgery.merging.ahead
from d2surgery.header import TensorInfo
from d2surgery.merging.ahead import HashAhead


def infos(path: Path, sizes: list[int]) -> dict[str, TensorInfo]:
    """Tensors back to back behind eight bytes that belong to none."""
    path.write_bytes(bytes(i * 7 % 251 for i in range(8 + sum(sizes))))
    starts = [8 + sum(sizes[:i]) for i in range(len(sizes))]
    return {
        f"t{i}": TensorInfo(path, "U8", (size,), start, start + size)
        for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
    }


def finished(ahead: HashAhead) -> dict[str, str]:
    """All that it hashes when nobody stops it."""
    ahead._thread.join()
    return ahead.stop()


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 40), max_size=6), piece=st.integers(1, 17))
def test_digests_are_those_of_each_tensors_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], piece: int
) -> None:
    path = tmp_path_factory.mktemp("ahead") / "model.safetensors"
    tensors = infos(path, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2surgery.merging.ahead, "_PIECE", piece)
        found = finished(HashAhead(tensors))
    content = path.read_bytes()
    assert found == {name: hashlib.sha256(content[i.start : i.stop]).hexdigest() for name, i in tensors.items()}


def test_stopped_early_it_has_whole_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second tensor: the first is known, the second and third are not."""
    tensors = infos(tmp_path / "model.safetensors", [10, 10, 10])
    real, pieces = hashlib.sha256, 0
    ahead: HashAhead

    class Counting:
        def __init__(self) -> None:
            self.inner = real()

        def update(self, data: bytes) -> None:
            nonlocal pieces
            pieces += 1
            if pieces == 4:
                ahead._stopping.set()
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    begun = threading.Event()
    run = HashAhead._run
    monkeypatch.setattr(HashAhead, "_run", lambda self: (begun.wait(), run(self))[1])
    monkeypatch.setattr(d2surgery.merging.ahead, "_PIECE", 4)
    monkeypatch.setattr(hashlib, "sha256", Counting)
    ahead = HashAhead(tensors)
    begun.set()
    assert finished(ahead) == {"t0": real((tmp_path / "model.safetensors").read_bytes()[8:18]).hexdigest()}


def test_a_file_that_became_shorter_gives_no_digest(tmp_path: Path) -> None:
    """The merge reads it too, and says TRUNCATED_FILE."""
    tensors = infos(tmp_path / "model.safetensors", [10, 10])
    (tmp_path / "model.safetensors").write_bytes(b"12345678" + bytes(15))
    assert set(finished(HashAhead(tensors))) == {"t0"}


def test_a_file_that_cannot_be_read_is_an_error_when_stopped(tmp_path: Path) -> None:
    tensors = infos(tmp_path / "model.safetensors", [10])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        finished(HashAhead(tensors))


def test_no_thread_outlives_the_block_whatever_ends_it(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), HashAhead(infos(tmp_path / "model.safetensors", [100] * 50)):
        raise KeyError
    assert threading.active_count() == before
