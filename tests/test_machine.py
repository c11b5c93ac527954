"""Work in threads: results in order, the first error in that order, an end to what is under way, no thread left."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import write_adapter, write_base

from d2surgery import machine
from d2surgery.cli import main
from d2surgery.files import positioned
from d2surgery.machine import ahead, side_by_side, uncollected
from d2surgery.merging import tiles
from d2surgery.surveying import modules


@given(st.lists(st.integers(), max_size=30), st.integers(1, 4), st.none() | st.integers(1, 40))
def test_every_item_gives_its_result_once_and_in_order(items: list[int], threads: int, in_hand: int | None) -> None:
    before = threading.enumerate()
    assert list(ahead(lambda item: 2 * item, items, threads, in_hand=in_hand)) == [2 * item for item in items]
    assert threading.enumerate() == before


@given(st.integers(1, 4), st.none() | st.integers(1, 9))
def test_no_more_items_are_taken_than_may_be_in_hand(threads: int, in_hand: int | None) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken

    with closing(ahead(lambda item: item, items(), threads, in_hand=in_hand)) as results:
        for seen, _ in enumerate(results):
            assert taken - seen <= (in_hand or threads + 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_side_by_side_each_has_one_core_and_alone_all(threads: int) -> None:
    before = torch.get_num_threads()
    used = list(side_by_side(lambda item: (item, torch.get_num_threads()), range(20), threads))
    assert used == [(item, before if threads == 1 else 1) for item in range(20)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("verb", ["merge", "audit", "spectrum", "report"])
def test_jobs_are_the_threads_of_this_verb_and_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", "lora")
    asked: list[int] = []

    def seen(original: Any) -> Any:
        def also(work: Any, items: Any, threads: int = 1, **choices: Any) -> Any:
            asked.append(threads)
            return original(work, items, threads, **choices)

        return also

    monkeypatch.setattr(tiles, "ahead", seen(ahead))
    monkeypatch.setattr(modules, "side_by_side", seen(side_by_side))
    pair = ["--base", str(base), "--adapter", str(adapter)]
    assert main(["merge", *pair, "--out", str(tmp_path / "merged"), "--jobs", "1", "--quiet"]) == 0
    for jobs in ("1", "3"):
        line = {
            "merge": [*pair, "--out", str(tmp_path / jobs), "--quiet"],
            "audit": [*pair, "--merged", str(tmp_path / "merged")],
            "spectrum": [str(adapter)],
            "report": [str(adapter), "--out", str(tmp_path / f"{jobs}.html"), "--quiet"],
        }
        asked.clear()
        assert main([verb, *line[verb], "--jobs", jobs]) == 0
        assert max(asked, default=1) == int(jobs)
    assert main([verb, *line[verb], "--jobs", "0"]) == 2
    assert "--jobs" in capsys.readouterr().err
    assert machine.workers() == min(len(os.sched_getaffinity(0)), 8)
    if verb == "merge":
        assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "3", "merged")}) == 1


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_of_several_errors_the_first_in_order_is_raised(kind: type[BaseException]) -> None:
    """Though the later item fails first: the error does not depend on which thread was faster."""
    before = threading.enumerate()
    later = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            assert later.wait(60)
        if item == 2:
            later.set()
        if item:
            raise kind(item)
        return item

    with pytest.raises(kind, match=r"^1$"):
        list(ahead(work, range(3), 2, in_hand=3))
    assert threading.enumerate() == before


@pytest.mark.parametrize("ended_by", ["an error", "the caller"])
def test_what_is_under_way_is_told_to_stop(ended_by: str) -> None:
    """The second item works until it is told: without that this would not end."""
    before = threading.enumerate()
    stopping, begun = threading.Event(), threading.Event()
    stopped = []

    def work(item: int) -> int:
        if item == 1:
            begun.set()
            stopped.append(stopping.wait(60))
        elif item == 0:
            assert begun.wait(60)
            if ended_by == "an error":
                raise ValueError(item)
        return item

    with closing(ahead(work, range(9), 2, in_hand=9, stopping=stopping)) as results:
        if ended_by == "an error":
            with pytest.raises(ValueError, match="0"):
                next(results)
        else:
            assert next(results) == 0
    assert stopped == [True]
    assert threading.enumerate() == before


def test_an_error_of_the_items_themselves_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    before = threading.enumerate()
    with pytest.raises(ValueError, match="no more"):
        list(ahead(lambda item: item, items()))
    assert threading.enumerate() == before


# Importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, KeyError])
def test_collection_is_off_inside_and_afterwards_as_it_was(enabled: bool, error: type[Exception] | None) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        try:
            with uncollected():
                assert not gc.isenabled()
                if error:
                    raise error
        except KeyError:
            pass
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_made_meanwhile_is_old_at_once_and_frozen_only_where_something_is(frozen: bool) -> None:
    try:
        if frozen:
            gc.freeze()
        with uncollected():
            made: list[object] = []
        assert bool(gc.get_freeze_count()) is frozen
        assert any(one is made for one in gc.get_objects(generation=2)) is not frozen
    finally:
        gc.unfreeze()


def test_garbage_made_meanwhile_is_collected_afterwards() -> None:
    with uncollected():
        made: set[object] = set()
        lost: list[object] = [made]
        lost.append(lost)
        alive = weakref.ref(made)
    assert alive() is not None
    del made, lost
    gc.collect()
    assert alive() is None


# Other systems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "times"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_memory_is_bytes_on_every_system(system: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS counts ru_maxrss in bytes, Linux in kilobytes."""
    import resource
    from types import SimpleNamespace

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(sys, "platform", system)
    assert machine.peak_memory() == 5000 * times


def test_without_resource_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory() == 0


AS_ON_WINDOWS = """
import os, sys
for name in ("resource", "fcntl", "pwd", "grp"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "pread", "preadv", "pwrite", "pwritev", "getuid",
             "sched_getaffinity", "posix_fadvise", "posix_fallocate", "statvfs"):
    if hasattr(os, name):
        delattr(os, name)
os.supports_dir_fd = set()
"""


def test_a_system_without_posix_reads_measures_and_converts(tmp_path: Path) -> None:
    """What Windows lacks is taken away in a process of its own: modules, flags, pread, descriptors of directories."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    code = f"""{AS_ON_WINDOWS}
from d2surgery.cli import main
work = sys.argv[1]
base, lora = work + "/base", work + "/lora"
for words in (["inspect", lora, "--base", base], ["spectrum", lora], ["drift", lora, "--base", base],
              ["diff", lora, lora], ["report", lora, "--base", base, "--out", work + "/page.html"],
              ["resize", lora, work + "/small", "--rank", "2"]):
    code = main([*words, "--json"])
    assert code == 0, (words, code)
sys.exit(main(["merge", "--base", base, "--adapter", lora, "--out", work + "/merged"]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout[-1000:] + done.stderr[-2000:]
    assert "OTHER_SYSTEM" in done.stderr
    assert not (tmp_path / "merged").exists()


def test_reading_without_pread_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    fd = os.open(path, os.O_RDONLY)
    whole = positioned.pread(fd, 50, 30)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pread", raising=False)
    buffer = bytearray(50)
    assert positioned.pread(fd, 50, 30) == whole
    assert positioned.pread_into(fd, memoryview(buffer), 30) == 50
    assert bytes(buffer) == whole
    assert positioned.pread_into(fd, memoryview(buffer), 190) == 10
    os.close(fd)
