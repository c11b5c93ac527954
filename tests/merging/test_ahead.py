"""Hashing while something else is imported: right digests, an end when asked, no process left behind."""

import hashlib
import io
import select
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2surgery.merging.ahead
from d2surgery.files.header import TensorInfo
from d2surgery.merging.ahead import HashAhead, hash_all


def infos(path: Path, sizes: list[int]) -> dict[str, TensorInfo]:
    """Tensors back to back behind eight bytes that belong to none."""
    path.write_bytes(bytes(i * 7 % 251 for i in range(8 + sum(sizes))))
    starts = [8 + sum(sizes[:i]) for i in range(len(sizes))]
    return {
        f"{path.stem} {i}": TensorInfo(path, "U8", (size,), start, start + size)
        for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
    }


def hashed(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """By hand."""
    return {
        name: hashlib.sha256(info.file.read_bytes()[info.start : info.stop]).hexdigest()
        for name, info in tensors.items()
    }


def finished(ahead: HashAhead) -> dict[str, str]:
    """All that it hashes when nobody stops it."""
    assert ahead._process is not None
    ahead._process.wait()
    return ahead.stop()


@given(sizes=st.lists(st.integers(0, 40), max_size=6), piece=st.integers(1, 17))
def test_digests_are_those_of_each_tensors_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], piece: int
) -> None:
    tensors = infos(tmp_path_factory.mktemp("ahead") / "model.safetensors", sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2surgery.merging.ahead, "_PIECE", piece)
        patch.setattr(sys, "stdout", said := io.TextIOWrapper(io.BytesIO()))
        files = [str(info.file) for info in tensors.values()]
        hash_all(files, [(i, info.start, info.nbytes) for i, info in enumerate(tensors.values())])
        said.seek(0)
        assert said.buffer.read().hex() == "".join(hashed(tensors).values())


@pytest.mark.parametrize("directory", ["plain", "with space", "ünïcode", "quote'\"", "\udcff"])
def test_a_process_of_its_own_hashes_tensors_of_several_files(tmp_path: Path, directory: str) -> None:
    try:
        (tmp_path / directory).mkdir()
    except OSError:
        pytest.skip("no such name on this file system")
    tensors = infos(tmp_path / directory / "a", [3, 0, 2_000_001]) | infos(tmp_path / directory / "b", [5])
    assert finished(HashAhead(tensors)) == hashed(tensors)


def test_stopped_early_it_has_whole_tensors_only(tmp_path: Path) -> None:
    """The second tensor is a hole of a terabyte: the first is known, the second and third never are."""
    tensors = infos(tmp_path / "model", [10])
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    hole = TensorInfo(tmp_path / "hole", "U8", (1 << 40,), 0, 1 << 40)
    ahead = HashAhead(tensors | {"hole": hole, "after": tensors["model 0"]})
    process = ahead._process
    assert process is not None
    assert process.stdout is not None
    select.select([process.stdout], [], [], 60)  # what was asked and the first digest come together
    assert ahead.stop() == hashed(tensors)
    assert process.returncode is not None
    assert ahead.stop() == {}


def test_a_file_that_became_shorter_or_is_gone_gives_no_digest_and_no_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The merge reads it too, and says what is wrong."""
    tensors = infos(tmp_path / "model", [10, 10])
    (tmp_path / "model").write_bytes(b"12345678" + bytes(15))
    assert set(finished(HashAhead(tensors))) == {"model 0"}
    (tmp_path / "model").unlink()
    assert finished(HashAhead(tensors)) == {}
    assert capfd.readouterr() == ("", "")


def test_more_tensors_than_it_takes_on_are_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d2surgery.merging.ahead, "_MOST", 3)
    assert list(finished(HashAhead(infos(tmp_path / "model", [1] * 5)))) == ["model 0", "model 1", "model 2"]


def test_what_it_is_told_and_says_fits_whatever_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument may have 128 KiB, and 64 KiB may wait in a pipe that nobody reads yet."""
    count = d2surgery.merging.ahead._MOST
    wanted: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: wanted.append(command))
    files = [tmp_path / f"model-{i:05d}-of-00200.safetensors" for i in range(200)]
    HashAhead(
        {str(i): TensorInfo(files[i % 200], "U8", (9,), 10**12 + i, 10**12 + i + 10**9) for i in range(2 * count)}
    )
    assert max(len(argument) for argument in wanted[0]) < 1 << 17
    assert 32 * count < 1 << 16


@pytest.mark.parametrize("executable", ["", "/no/such/python", "/bin/echo", "/bin/true"])
def test_without_a_python_to_run_nothing_is_hashed_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    """Nor where it is another program, whatever that says."""
    monkeypatch.setattr(sys, "executable", executable)
    ahead = HashAhead(infos(tmp_path / "model", [10]))
    if ahead._process is not None:
        ahead._process.wait()
    assert ahead.stop() == {}


def test_no_process_outlives_the_block_whatever_ends_it(tmp_path: Path) -> None:
    ahead = HashAhead(infos(tmp_path / "model", [100] * 50))
    process = ahead._process
    assert process is not None
    with pytest.raises(KeyError), ahead:
        raise KeyError
    assert process.returncode is not None
