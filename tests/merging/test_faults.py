"""File systems that fail: one error that names a file, the inputs untouched, nothing that looks whole, and after it
`--resume` gives every byte of an undisturbed merge.

The system's calls are made to fail within this process: all that merging reads and writes goes through them. The limit
of a file's size is the kernel's own.
"""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from longer import one_in
from safetensors.torch import save_file

import d2surgery.merging.tiles
from d2surgery import DoRA, from_adapters, save
from d2surgery.cli import main

SHARD = 8000
WRITING = (
    "open", "mkdir", "posix_fallocate", "write", "pwrite", "fsync", "fdatasync", "close", "unlink", "rename",
    "ftruncate",
)  # fmt: skip
READING = ("open", "pread", "preadv", "fstat", "stat")
FAILING = [("pwrite", errno.ENOSPC), ("write", errno.EDQUOT), *((n, errno.EIO) for n in sorted({*WRITING, *READING}))]


class Scene(NamedTuple):
    base: Path
    adapter: Path
    whole: dict[str, bytes]
    inputs: dict[str, bytes]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", 256)
    monkeypatch.setattr("d2surgery.files.writer.FLUSH", 2000)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    (folder / "base").mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.proj.weight": torch.randn(40, 24, generator=generator).bfloat16() for i in range(4)}
    save_file(weights, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text('{"model_type": "x"}')
    (folder / "base/tokenizer.json").write_text("{}")
    adapters = {
        name.removesuffix(".weight"): DoRA(
            A=torch.randn(2, 24, generator=generator),
            B=torch.randn(40, 2, generator=generator),
            magnitude=torch.rand(40, generator=generator) + 1,
            scaling=0.1,
        )
        for name in weights
    }
    save(from_adapters(adapters), folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", 256)
        assert main(command(folder / "base", folder / "adapter", folder / "whole")) == 0
    inputs = contents(folder / "base") | contents(folder / "adapter")
    return Scene(folder / "base", folder / "adapter", contents(folder / "whole"), inputs)


def command(base: Path, adapter: Path, out: Path, *options: str) -> list[str]:
    given = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), "--quiet"]
    return [*given, "--shard-size", str(SHARD), *options]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Failing:
    """A function of the system whose calls number `first` and all after it, or that one alone, fail."""

    def __init__(self, function: Callable[..., Any], first: int, number: int, *, once: bool) -> None:
        self.function, self.first, self.number, self.once = function, first, number, once
        self.calls = self.failed = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.first or (self.calls - 1 > self.first and not self.once):
            self.failed += 1
            if self.function is os.close or self.function.__name__ == "close":
                self.function(*arguments)  # the descriptor is gone, whatever the system says of it
            named = arguments and isinstance(arguments[0], str | Path) and "dir_fd" not in options
            raise OSError(self.number, os.strerror(self.number), *([str(arguments[0])] if named else []))
        return self.function(*arguments, **options)


@pytest.mark.parametrize("once", one_in(2, [False, True]))
@pytest.mark.parametrize("call", one_in(2, FAILING))
def test_whichever_call_fails_nothing_is_lost_and_nothing_looks_whole(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: tuple[str, int], once: bool
) -> None:
    """Which call it will be is found by trying: the first ones, and some of the later ones."""
    (name, number), seen = call, 0
    for first in (*range(6), 9, 14):
        out = tmp_path / f"out {first}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, failing := Failing(getattr(os, name), first, number, once=once))
            code = main(command(scene.base, scene.adapter, out))
        said = capsys.readouterr()
        case = f"{name} {first}: {said.err}"
        if not failing.failed:
            assert code == 0, case
            break
        seen += 1
        assert contents(scene.base) | contents(scene.adapter) == scene.inputs
        if code == 0:  # a failure that changes nothing: to close what has been read, to ask for a directory's mode
            assert contents(out) == scene.whole, case
            continue
        assert code == 2, case
        assert said.err.count("error ") == 1, case
        assert str(tmp_path) in said.err or str(scene.base.parent) in said.err, f"it names a file: {case}"
        if out.exists():
            assert contents(out).items() >= scene.whole.items(), case
        if contents(out) != scene.whole if out.exists() else True:
            assert main(command(scene.base, scene.adapter, out, "--resume")) == 0, capsys.readouterr().err + case
        assert contents(out) == scene.whole, case
        assert not out.with_name(f".{out.name}.partial").exists()
    assert seen or not hasattr(os, name) or name == "stat"


@pytest.mark.parametrize("size", [0, 50, 3000, 5000, 7600])
def test_a_limit_on_the_size_of_files_is_an_error_that_names_the_file(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        code = main(command(scene.base, scene.adapter, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2
    assert "File too large" in said
    assert str(tmp_path / ".out.partial") in said
    assert not (tmp_path / "out").exists()
    assert main(command(scene.base, scene.adapter, tmp_path / "out", "--resume")) == 0
    assert contents(tmp_path / "out") == scene.whole


def test_reads_and_writes_of_a_byte_or_a_few_lose_none(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, preadv, write, pwrite = os.pread, os.preadv, os.write, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 7), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:300]], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:11]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:200], at))
    assert main(command(scene.base, scene.adapter, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == scene.whole


def test_companions_that_cannot_be_read_are_named(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert main(command(scene.base, scene.adapter, tmp_path / "out")) == 2
    assert str(scene.base / "tokenizer.json") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command(scene.base, scene.adapter, tmp_path / "out", "--resume")) == 0
    assert contents(tmp_path / "out") == scene.whole
