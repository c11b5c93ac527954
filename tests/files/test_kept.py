"""Hashes of a base kept from one run to the next: never of other bytes, and never in the way."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import safetensors_bytes

from d2surgery.files import kept
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import TensorInfo
from d2surgery.files.kept import KeptHashes, cache_folder

SHAPES = {"a": (4, 3), "b": (5,)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def _of_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that these tests have just written count as written long ago."""
    monkeypatch.setattr(kept, "_TICK", -3600)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(safetensors_bytes(SHAPES))
    return path


def tensors(path: Path) -> dict[str, TensorInfo]:
    return dict(BaseWeights(path.parent).header.tensors)


def digests(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return {name: hashlib.sha256(content[i.start : i.stop]).hexdigest() for name, i in tensors(path).items()}


def places() -> Iterator[Path]:
    folder = cache_folder()
    assert folder is not None
    return folder.rglob("*.json")


@pytest.mark.usefixtures("_of_age")
def test_what_was_hashed_is_known_and_only_that(base: Path) -> None:
    assert KeptHashes(tensors(base)).known == {}
    KeptHashes(tensors(base)).keep({"a": digests(base)["a"], "no such tensor": "0" * 64})
    assert KeptHashes(tensors(base)).known == {"a": digests(base)["a"]}
    assert KeptHashes(tensors(base)).unknown.keys() == {"b"}
    assert KeptHashes(tensors(base), again=True).known == {}
    KeptHashes(tensors(base)).keep({"b": digests(base)["b"]})
    assert KeptHashes(tensors(base)).known == digests(base)


@pytest.mark.usefixtures("_of_age")
@pytest.mark.parametrize(
    "change", ["written to", "replaced", "written to, times set back", "moved here from elsewhere"]
)
def test_a_file_that_may_have_changed_is_unknown(base: Path, change: str) -> None:
    KeptHashes(tensors(base)).keep(digests(base))
    before = base.stat()
    if change.startswith("written to"):
        with base.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
    else:
        other = base.with_name("other")
        other.write_bytes(base.read_bytes())
        other.replace(base)
    if change != "written to":
        os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert KeptHashes(tensors(base)).known == {}


def test_of_a_file_just_written_nothing_is_kept(base: Path) -> None:
    """Within a tick of the clock it may be written to again, and its times would not say so."""
    KeptHashes(tensors(base)).keep(digests(base))
    assert KeptHashes(tensors(base)).known == {}
    assert not list(places())


@pytest.mark.usefixtures("_of_age")
@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"0-1": 3}', '{"a": "short"}', "\0", "null"])
def test_a_cache_that_is_none_is_no_cache(base: Path, content: str) -> None:
    KeptHashes(tensors(base)).keep(digests(base))
    for place in places():
        place.write_text(content)
    assert KeptHashes(tensors(base)).known == {}
    KeptHashes(tensors(base)).keep(digests(base))
    assert KeptHashes(tensors(base)).known == digests(base)


@pytest.mark.usefixtures("_of_age")
def test_a_cache_that_cannot_be_written_is_not_missed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    KeptHashes(tensors(base)).keep(digests(base))
    assert KeptHashes(tensors(base)).known == {}


@pytest.mark.usefixtures("_of_age")
def test_a_user_without_a_home_keeps_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is none, as the XDG specification has it: it would be another one in each directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    for usual in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", usual)
        KeptHashes(tensors(base)).keep(digests(base))
        assert KeptHashes(tensors(base)).known == {}
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.usefixtures("_of_age")
def test_the_files_used_last_are_remembered(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST", 2)
    for number in range(4):
        base.write_bytes(safetensors_bytes({**SHAPES, "c": (number + 1,)}))
        KeptHashes(tensors(base)).keep(digests(base))
    assert len(list(places())) == 2
    assert KeptHashes(tensors(base)).known == digests(base)
    assert all(isinstance(json.loads(place.read_text()), dict) for place in places())
