"""A merge that is killed, starved or damaged in the middle: nothing half-written looks whole, and it can be resumed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import d2surgery.files.writer
import d2surgery.merging.job
from d2surgery.adapters import D2LoRA
from d2surgery.checkpoint import from_adapters, save
from d2surgery.errors import D2SurgeryError
from d2surgery.files.partial import JOURNAL
from d2surgery.merging import merge, receipt

TILE = 128
SHARD = 4000  # bytes: two tensors of 1920 each
SHARDS = 5

KILLED = f"""
import os, signal, sys
from pathlib import Path
import d2surgery.merging, d2surgery.merging.tiles

d2surgery.merging.tiles.TILE_ENTRIES = {TILE}
base, adapter, out = map(Path, sys.argv[1:])
journal = out.parent / f".{{out.name}}.partial" / "{JOURNAL}"
after = 0

def progress(done, total):
    global after
    if len(journal.read_text().splitlines()) == 4:  # the recipe, who writes and two shards
        after += 1
    if after == 4:  # some tiles into the third
        os.kill(os.getpid(), signal.SIGKILL)

d2surgery.merging.merge(base, adapter, out, shard_size={SHARD}, progress=progress)
"""


class Scene(NamedTuple):
    base: Path
    adapter: Path
    whole: dict[str, bytes]  # what an uninterrupted merge writes
    killed: Path  # the .partial directory that kill -9 left


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", TILE)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    base = folder / "base"
    base.mkdir()
    weights = {f"layers.{i}.proj.weight": numbers(40, 24, seed=i).bfloat16() for i in range(2 * SHARDS)}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapters = {
        f"layers.{i}.proj": D2LoRA(
            A_plus=numbers(2, 24, seed=i + 100),
            B_plus=numbers(40, 2, seed=i + 200),
            A_minus=numbers(2, 24, seed=i + 300),
            B_minus=numbers(40, 2, seed=i + 400),
            scaling=0.1,
        )
        for i in range(2 * SHARDS)
    }
    save(from_adapters(adapters), folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", TILE)
        merge(base, folder / "adapter", folder / "whole", shard_size=SHARD)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, base, folder / "adapter", folder / "out"], check=False, capture_output=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (folder / "out").exists()
    return Scene(base, folder / "adapter", contents(folder / "whole"), folder / ".out.partial")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def resumed(scene: Scene, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Continue from what the kill left, or from what `change` made of it."""

    def resume(change: Callable[[Path], Any] = lambda partial: None, **options: Any) -> dict[str, bytes]:
        partial = tmp_path / ".out.partial"
        if not partial.exists():
            shutil.copytree(scene.killed, partial)
        change(partial)
        options = {"shard_size": SHARD, "resume": True, **options}
        merge(scene.base, scene.adapter, tmp_path / "out", **options)
        assert not partial.exists()
        return contents(tmp_path / "out")

    return resume


def shard(number: int) -> str:
    return f"model-{number:05d}-of-{SHARDS:05d}.safetensors"


def codes(error: pytest.ExceptionInfo[D2SurgeryError]) -> list[str]:
    return [problem.code for problem in error.value.problems]


# Killed ---------------------------------------------------------------------------------------------------------------


def test_kill_leaves_a_partial_directory_and_no_output(scene: Scene) -> None:
    assert {shard(1), shard(2), shard(3), JOURNAL} == {path.name for path in scene.killed.iterdir()}
    assert len((scene.killed / JOURNAL).read_text().splitlines()) == 4
    assert (scene.killed / shard(3)).read_bytes() != scene.whole[shard(3)], "killed before the third was whole"


def test_resuming_gives_every_byte_of_an_uninterrupted_merge(
    scene: Scene, resumed: Callable[..., dict[str, bytes]]
) -> None:
    assert resumed() == scene.whole


def test_resuming_does_not_write_finished_shards_again(
    scene: Scene, resumed: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    opened = d2surgery.files.writer.ShardWriter

    def writer(path: Path, *args: Any, **options: Any) -> Any:
        written.append(path.name)
        return opened(path, *args, **options)

    monkeypatch.setattr(d2surgery.merging.job, "ShardWriter", writer)
    assert resumed() == scene.whole
    assert written == [shard(3), shard(4), shard(5)]


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _line(partial: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = (partial / JOURNAL).read_text().splitlines()
    last = json.loads(lines[-1])
    change(last)
    (partial / JOURNAL).write_text("".join(f"{line}\n" for line in [*lines[:-1], json.dumps(last)]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: _flip(partial / shard(1)),
        lambda partial: _flip(partial / shard(1), at=40),
        lambda partial: (partial / shard(1)).write_bytes((partial / shard(1)).read_bytes() + b"x"),
        lambda partial: (partial / shard(2)).unlink(),
        lambda partial: (partial / shard(2)).write_bytes(b""),
        lambda partial: os.truncate(partial / shard(1), 2000),
        lambda partial: (partial / JOURNAL).write_text((partial / JOURNAL).read_text() + '{"file": "model-0000'),
        lambda partial: (partial / JOURNAL).write_text((partial / JOURNAL).read_text()[:-40]),
        lambda partial: _line(partial, lambda line: line["outputs"].popitem()),
    ],
    ids=[
        "flipped",
        "header",
        "longer",
        "gone",
        "emptied",
        "short",
        "torn",
        "cut",
        "lost-hash",
    ],
)
def test_what_was_damaged_is_done_again(
    scene: Scene, resumed: Callable[..., dict[str, bytes]], damage: Callable[[Path], Any]
) -> None:
    assert resumed(damage) == scene.whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: (partial / JOURNAL).write_text(""),
        lambda partial: (partial / JOURNAL).write_text('{"torn'),
        lambda partial: (partial / JOURNAL).write_text('{"a": "journal of something else"}\n'),
        lambda partial: (partial / JOURNAL).write_text("[" * 100_000 + "\n"),
        lambda partial: (partial / JOURNAL).unlink(),
    ],
    ids=["no-lines", "torn-recipe", "another", "deep", "no-journal"],
)
def test_a_directory_without_our_journal_is_named_and_left_as_it_is(
    resumed: Callable[..., dict[str, bytes]], tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    """It may be anybody's: a model that somebody keeps there would be lost."""
    with pytest.raises(D2SurgeryError, match="is in the way") as error:
        resumed(damage)
    assert codes(error) == ["OUTPUT_EXISTS"]
    before = contents(tmp_path / ".out.partial")
    assert before.keys() >= {shard(1), shard(2)}
    with pytest.raises(D2SurgeryError, match="is in the way") as error:
        resumed(resume=False)
    assert codes(error) == ["OUTPUT_EXISTS"]
    assert contents(tmp_path / ".out.partial") == before


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"shard_size": SHARD + 1}, "shard_size"),
        ({"dtype": "F32"}, "dtype"),
        ({"strength": 0.5}, "strength"),
        ({"verify": False}, "verify"),
    ],
)
def test_other_options_are_another_merge(
    resumed: Callable[..., dict[str, bytes]], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(D2SurgeryError, match=field) as error:
        resumed(**options)
    assert codes(error) == ["RESUME_MISMATCH"]


def test_another_processor_or_library_is_another_merge(
    resumed: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file from each would be nobody's merge."""
    own = receipt.arithmetic(torch.device("cpu"))
    for field in own:
        monkeypatch.setattr(receipt, "arithmetic", lambda device, field=field: own | {field: "another"})
        with pytest.raises(D2SurgeryError, match="these differ: arithmetic") as error:
            resumed()
        assert codes(error) == ["RESUME_MISMATCH"]


def test_another_adapter_or_base_is_another_merge(scene: Scene, tmp_path: Path) -> None:
    for changed in ("base", "adapter"):
        folder = tmp_path / changed
        shutil.copytree(scene.base, folder / "base")
        shutil.copytree(scene.adapter, folder / "adapter")
        shutil.copytree(scene.killed, folder / ".out.partial")
        if changed == "adapter":
            shutil.copystat(scene.base / "model.safetensors", folder / "base" / "model.safetensors")
            _flip(folder / "adapter" / "adapter_model.safetensors")
        else:
            os.utime(folder / "base" / "model.safetensors", (1, 1))
        with pytest.raises(D2SurgeryError) as error:
            merge(folder / "base", folder / "adapter", folder / "out", shard_size=SHARD, resume=True)
        assert codes(error) == ["RESUME_MISMATCH"]


def test_without_hashes_nothing_is_taken_for_finished(scene: Scene, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"shard_size": SHARD, "verify": False}
    with pytest.raises(KeyboardInterrupt):
        merge(scene.base, scene.adapter, tmp_path / "out", progress=stop, **options)
    (tmp_path / ".out.partial" / shard(1)).unlink()
    _flip(tmp_path / ".out.partial" / shard(2))
    merge(scene.base, scene.adapter, tmp_path / "out", resume=True, **options)
    weights = {name: data for name, data in scene.whole.items() if name.endswith(".safetensors")}
    assert weights == {name: contents(tmp_path / "out")[name] for name in weights}


def test_other_tiles_are_another_merge(
    resumed: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", 2 * TILE)
    with pytest.raises(D2SurgeryError, match="tile") as error:
        resumed()
    assert codes(error) == ["RESUME_MISMATCH"]


def test_an_unfinished_merge_is_not_overwritten_unasked(resumed: Callable[..., dict[str, bytes]]) -> None:
    with pytest.raises(D2SurgeryError, match="--resume") as error:
        resumed(resume=False)
    assert codes(error) == ["OUTPUT_EXISTS"]


def test_resume_with_nothing_to_resume_begins(scene: Scene, tmp_path: Path) -> None:
    merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD, resume=True)
    assert contents(tmp_path / "out") == scene.whole


# The disk -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_can_be_resumed(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line says DISK_FULL where the system says ENOSPC."""
    pwrite, calls, before = os.pwrite, iter(range(100)), threading.enumerate()

    def full(*args: Any) -> int:
        if next(calls) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space") as error:
            merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert threading.enumerate() == before
    merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD, resume=True)
    assert contents(tmp_path / "out") == scene.whole


def test_writes_that_take_a_few_bytes_at_a_time_lose_none(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:50], position))
    merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD)
    assert contents(tmp_path / "out") == scene.whole


def test_a_disk_too_small_is_known_before_anything_is_written(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(D2SurgeryError, match="got 5000") as error:
        merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD)
    assert codes(error) == ["DISK_FULL"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_already_written_counts_when_resuming(
    scene: Scene, resumed: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(len(data) for name, data in scene.whole.items() if name.endswith(".safetensors"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, need - 5000))
    assert resumed() == scene.whole


def test_too_little_memory_is_said_with_what_would_do(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match=r"wanted at least \d+ MB; got 1 MB") as error:
        merge(scene.base, scene.adapter, tmp_path / "out", max_memory=1_000_000)
    assert codes(error) == ["MEMORY"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["file", "directory"])
def test_an_output_path_that_is_taken_is_left_alone(scene: Scene, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    kept = out if taken == "file" else out / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    for resume in (False, True):
        with pytest.raises(D2SurgeryError, match="taken") as error:
            merge(scene.base, scene.adapter, out, resume=resume)
        assert codes(error) == ["OUTPUT_EXISTS"]
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_the_output(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD)
    assert contents(tmp_path / "out") == scene.whole


def test_parents_of_the_output_are_made(scene: Scene, tmp_path: Path) -> None:
    merge(scene.base, scene.adapter, tmp_path / "a" / "b" / "out", shard_size=SHARD)
    assert contents(tmp_path / "a" / "b" / "out") == scene.whole


def test_a_parent_that_cannot_hold_the_output_is_the_systems_error(scene: Scene, tmp_path: Path) -> None:
    """No permission raises alike; root, who runs these tests in containers, always has it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        merge(scene.base, scene.adapter, tmp_path / "file" / "out")


def test_a_relative_output_path_is_that_of_the_working_directory(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    merge(scene.base, scene.adapter, "out", shard_size=SHARD)
    assert contents(tmp_path / "out") == scene.whole
