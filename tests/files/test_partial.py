"""Where a checkpoint is built and how it comes to its place: one writer, no link followed, nobody's directory lost."""

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from d2surgery.errors import D2SurgeryError
from d2surgery.files import lock, partial
from d2surgery.files.partial import JOURNAL, Partial, Sources

RECIPE = {"adapter": "0", "versions": ["1"], "shard_size": 2}
CONTENT = {"model.safetensors": b"weights", "config.json": b"{}"}


def build(
    out: Path,
    *,
    resume: bool = False,
    recipe: Any = RECIPE,
    sources: Sources | None = None,
    meanwhile: Callable[[Path], Any] = lambda left: None,
) -> bool:
    """Whether there was something to do. An output from its beginning to its end."""
    with Partial(out, sync=True, sources=sources or Sources()) as building:
        building.claim(resume=resume)
        if building.begin(recipe, CONTENT):
            return False
        for name, content in CONTENT.items():
            building.write(name, content)
            meanwhile(building.path)
        building.publish()
    return True


def stop(out: Path) -> Path:
    """What is left of one that ended before its end."""
    with Partial(out, sync=True) as building:
        building.claim(resume=False)
        building.begin(RECIPE, CONTENT)
        building.write("model.safetensors", b"half")
    return building.path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(out: Path, *, resume: bool = False, code: str = "OUTPUT_EXISTS", match: str = "") -> None:
    with pytest.raises(D2SurgeryError, match=match) as error, Partial(out, sync=True) as building:
        building.claim(resume=resume)
    assert [problem.code for problem in error.value.problems] == [code]


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else []  # noqa: PTH208
    yield
    after = sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else []  # noqa: PTH208
    assert len(after) <= len(before)


# The output path -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["elsewhere", "file", "nothing"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_at_the_output_path_is_refused_before_any_work(tmp_path: Path, to: str, resume: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / to)
    before = sorted(tmp_path.iterdir())
    refused(tmp_path / "out", resume=resume, match="symbolic link")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("given", [".", "", "./", "../here", "{here}", "{here}/../here"])
def test_the_working_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(Path(given.format(here=tmp_path / "here")), match="working directory")


@pytest.mark.parametrize("given", ["..", "/", "../..", "here/.."])
def test_what_holds_the_working_directory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    (tmp_path / "a/b/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    refused(Path(given), match="taken")


@pytest.mark.parametrize(
    "given", ["out/", "./out", "x/../out", "link/out", "new/er/out", "leer zeichen", "ünï.safetensors"]
)
def test_other_spellings_are_published_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    assert build(Path(given))
    assert contents(tmp_path / given) == CONTENT
    assert not list(tmp_path.rglob("*.partial"))


def test_a_change_of_the_working_directory_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with Partial(Path("out"), sync=True) as building:
        building.claim(resume=False)
        building.begin(RECIPE, CONTENT)
        monkeypatch.chdir(tmp_path / "x")
        building.write("config.json", b"{}")
        building.publish()
    assert contents(tmp_path / "out") == {"config.json": b"{}"}
    assert not list((tmp_path / "x").iterdir())


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the kernel tells by its device, and one of the same file system that only its table names."""
    (tmp_path / "out dir").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out dir")
        refused(tmp_path / "out dir", match="mounted")
    table, read = str(tmp_path / "out dir").replace(" ", r"\040"), Path.read_text
    line = f"36 35 98:0 /mnt1 {table} rw,noatime master:1 - ext3 /dev/root rw\n"
    proc = Path("/proc/self/mountinfo")
    monkeypatch.setattr(Path, "read_text", lambda path, **o: line if path == proc else read(path, **o))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    refused(tmp_path / "out dir", match="mounted")


def test_a_parent_on_a_file_system_that_is_read_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode of the parent alone does not tell it, nor root from others."""
    found = os.statvfs(tmp_path)
    fields = [found.f_flag | os.ST_RDONLY if at == 8 else value for at, value in enumerate(found)]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(OSError, match="Read-only") as error, Partial(tmp_path / "a/b", sync=True) as building:
        building.claim(resume=False)
    assert (error.value.errno, error.value.filename) == (errno.EROFS, str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_in_which_we_may_not_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(0o555)
    with pytest.raises(PermissionError) as error, Partial(tmp_path / "shut/out", sync=True) as building:
        building.claim(resume=False)
    assert error.value.filename == str(tmp_path / "shut")


# What lies in the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file", "link", "journal link", "journal fifo", "hard link", "text"])
def test_what_no_merge_left_survives_and_is_named(tmp_path: Path, kind: str, resume: bool) -> None:
    stop(tmp_path / "other")
    theirs, there = tmp_path / "theirs", tmp_path / ".out.partial"
    (tmp_path / ".other.partial").rename(theirs)
    if kind == "directory":
        there.mkdir()
        (there / "model.safetensors").write_text("my only copy")
    elif kind == "file":
        there.write_text("mine")
    elif kind == "link":
        there.symlink_to(theirs)
    else:
        there.mkdir()
        made: dict[str, Callable[[], Any]] = {
            "journal link": lambda: (there / JOURNAL).symlink_to(theirs / JOURNAL),
            "journal fifo": lambda: os.mkfifo(there / JOURNAL),
            "hard link": lambda: (there / JOURNAL).hardlink_to(theirs / JOURNAL),
            "text": lambda: (there / JOURNAL).write_text("day 1: it rained\n"),
        }
        made[kind]()
    before = {p: p.lstat().st_size for p in tmp_path.rglob("*")}
    refused(tmp_path / "out", resume=resume, match=r"is in the way.*Move it")
    assert {p: p.lstat().st_size for p in tmp_path.rglob("*")} == before


def test_another_users_directory_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path / "out")
    fstat = os.fstat

    def of_another(fd: int) -> os.stat_result:
        found = fstat(fd)
        foreign = stat.S_ISDIR(found.st_mode)
        return os.stat_result([4242 if at == 4 and foreign else value for at, value in enumerate(found)])

    monkeypatch.setattr(os, "fstat", of_another)
    with pytest.raises(D2SurgeryError, match="another user's directory") as error:
        partial._check_owner(fd := os.open(tmp_path / ".out.partial", os.O_RDONLY), tmp_path)
    os.close(fd)
    assert error.value.problems[0].code == "OUTPUT_EXISTS"
    assert sorted(p.name for p in (tmp_path / ".out.partial").iterdir()) == [JOURNAL, "model.safetensors"]


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_links_planted_where_files_will_be_lead_nowhere(tmp_path: Path, link: str) -> None:
    """Before the files are made, and between two of them."""
    target = tmp_path / "precious"
    target.write_text("mine")
    left = stop(tmp_path / "out")
    (left / "model.safetensors").unlink()
    plant = Path.symlink_to if link == "symbolic" else Path.hardlink_to
    plant(left / "model.safetensors", target)
    build(
        tmp_path / "out",
        resume=True,
        meanwhile=lambda left: (left / "config.json").exists() or plant(left / "config.json", target),
    )
    assert contents(tmp_path / "out") == CONTENT
    assert not any(path.is_symlink() or path.lstat().st_nlink > 1 for path in (tmp_path / "out").iterdir())
    assert target.read_text() == "mine"


def test_a_directory_put_in_the_place_of_ours_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()

    def swap(left: Path) -> None:
        if not left.is_symlink():
            left.rename(tmp_path / "moved")
            left.symlink_to("theirs")

    with pytest.raises(D2SurgeryError, match="in its place") as error:
        build(tmp_path / "out", meanwhile=swap)
    assert error.value.problems[0].code == "OUTPUT_IN_USE"
    assert contents(tmp_path / "moved").items() > CONTENT.items(), "written where it was, not through the link"
    assert not list((tmp_path / "theirs").iterdir())
    assert not (tmp_path / "out").exists()


def test_what_the_merge_does_not_write_is_not_published_with_it(tmp_path: Path) -> None:
    left = stop(tmp_path / "out")
    (left / "thesis.txt").write_text("mine")
    with pytest.raises(D2SurgeryError, match=r"does not write.*thesis\.txt"):
        build(tmp_path / "out", resume=True)
    assert (left / "thesis.txt").read_text() == "mine"
    (left / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert build(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == CONTENT


@pytest.mark.parametrize("stands", [(), (JOURNAL,)])
def test_killed_before_the_journal_had_a_line_it_begins(tmp_path: Path, stands: tuple[str, ...]) -> None:
    (tmp_path / ".out.partial").mkdir()
    for name in stands:
        (tmp_path / ".out.partial" / name).write_text("")
    assert build(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == CONTENT


def test_an_empty_directory_in_the_way_stays_empty_where_nobody_resumes(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    refused(tmp_path / "out", match="is in the way")
    assert not list((tmp_path / ".out.partial").iterdir())


def test_a_journal_cut_in_its_first_line_by_a_full_disk_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=re.escape(f"{tmp_path}/.out.partial/{JOURNAL}")):
            build(tmp_path / "out")
    assert build(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == CONTENT


# Publishing ------------------------------------------------------------------------------------------------------


def test_stopped_before_each_of_its_calls_publishing_is_finished_or_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would: no cleaning up. After every stop the output is not there or whole."""
    names = ("fsync", "rename", "unlink")
    seen: set[bool] = set()
    for at in range(20):
        out, calls, done = tmp_path / f"out{at}", iter(range(100)), False
        with monkeypatch.context() as patch, Partial(out, sync=True) as building:
            building.claim(resume=False)
            building.begin(RECIPE, CONTENT)
            for name, content in CONTENT.items():
                building.write(name, content)
            for name in names:
                patch.setattr(os, name, stopping(getattr(os, name), calls, at))
            try:
                building.publish()
                done = True
            except KeyboardInterrupt:
                pass
        seen.add(out.exists())
        if out.exists():
            assert contents(out).items() >= CONTENT.items()
        if done:
            assert contents(out) == CONTENT
            break
        if contents(out) != CONTENT if out.exists() else True:
            build(out, resume=True)
        assert contents(out) == CONTENT
        assert not out.with_name(f".{out.name}.partial").exists()
    assert at == 5, "two directories and their parent, the name, the journal"
    assert seen == {False, True}


def stopping(function: Callable[..., Any], calls: Iterator[int], at: int) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return called


def test_what_was_published_but_not_tidied_up_is_said_and_finished_by_the_same_recipe_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "_tidy", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            build(tmp_path / "out")
    assert contents(tmp_path / "out").items() > CONTENT.items()
    refused(tmp_path / "out", match="--resume")
    with pytest.raises(D2SurgeryError, match="RESUME_MISMATCH"):
        build(tmp_path / "out", resume=True, recipe=RECIPE | {"shard_size": 3})
    assert build(tmp_path / "out", resume=True) is False
    assert contents(tmp_path / "out") == CONTENT
    refused(tmp_path / "out", resume=True, match="taken")


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_came_to_stand_at_the_output_path_meanwhile_survives(tmp_path: Path, kind: str) -> None:
    (tmp_path / "theirs").mkdir()

    def stand(left: Path) -> None:
        if os.path.lexists(tmp_path / "out"):
            return
        if kind == "directory":
            (tmp_path / "out").mkdir()
            (tmp_path / "out/thesis.txt").write_text("mine")
        elif kind == "file":
            (tmp_path / "out").write_text("mine")
        else:
            (tmp_path / "out").symlink_to("theirs")

    with pytest.raises(D2SurgeryError, match="came to stand") as error:
        build(tmp_path / "out", meanwhile=stand)
    assert error.value.problems[0].code == "OUTPUT_EXISTS"
    (tmp_path / "out").rename(tmp_path / "moved")
    assert build(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == CONTENT
    assert not list((tmp_path / "theirs").iterdir())


# One writer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path: Path, resume: bool) -> None:
    with Partial(tmp_path / "out", sync=True) as building:
        building.claim(resume=False)
        building.begin(RECIPE, CONTENT)
        who = rf"process {os.getpid()} on {re.escape(os.uname().nodename)}, since 20\d\d-"
        refused(tmp_path / "out", resume=resume, code="OUTPUT_IN_USE", match=who)
    refused(tmp_path / "out", match="--resume")


def test_two_that_begin_together_are_one_and_a_refusal(tmp_path: Path) -> None:
    for at in range(20):
        told: list[str] = []
        together = threading.Barrier(3)

        def begin(resume: bool, at: int = at, told: list[str] = told, together: Any = together) -> None:
            together.wait()
            try:
                with Partial(tmp_path / f"out{at}", sync=False) as building:
                    building.claim(resume=resume)
                    building.begin(RECIPE, CONTENT)
                    told.append("begun")
                    together.wait(10)
            except D2SurgeryError as error:
                told.append(error.problems[0].code)
                together.wait(10)

        threads = [threading.Thread(target=begin, args=(resume,)) for resume in (True, False, True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told)[-1] == "begun"
        assert told.count("begun") == 1
        assert set(told) <= {"begun", "OUTPUT_IN_USE", "OUTPUT_EXISTS"}


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from d2surgery.files.partial import Partial
building = Partial(Path({str(tmp_path / "out")!r}), sync=False)
building.claim(resume=False)
building.begin({RECIPE!r}, ())
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / ".out.partial" / JOURNAL).exists()
    assert build(tmp_path / "out", resume=True)


def test_without_locks_a_living_writer_on_this_machine_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stop(tmp_path / "out")
    journal = (left / JOURNAL).read_text()

    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with subprocess.Popen(["sleep", "60"]) as alive:
        (left / JOURNAL).write_text(journal.replace(f'"pid": {os.getpid()}', f'"pid": {alive.pid}'))
        refused(tmp_path / "out", resume=True, code="OUTPUT_IN_USE", match=f"process {alive.pid} ")
        alive.kill()
    assert build(tmp_path / "out", resume=True)


# Who may read it -------------------------------------------------------------------------------------------------


def modes(out: Path) -> tuple[str, set[str]]:
    return f"{out.stat().st_mode & 0o777:o}", {f"{path.stat().st_mode & 0o777:o}" for path in out.iterdir()}


@pytest.mark.parametrize(
    ("umask", "directory", "file", "want"),
    [
        (0o022, 0o755, 0o644, ("755", {"644"})),
        (0o022, 0o700, 0o644, ("700", {"644"})),
        (0o022, 0o755, 0o600, ("755", {"600"})),
        (0o000, 0o750, 0o640, ("750", {"640"})),
        (0o077, 0o755, 0o644, ("700", {"600"})),
        (0o002, 0o775, 0o664, ("775", {"664"})),
        (0o022, 0o555, 0o444, ("755", {"644"})),
    ],
)
def test_an_output_is_no_more_open_than_what_it_is_made_of_nor_than_the_umask(
    tmp_path: Path, umask: int, directory: int, file: int, want: tuple[str, set[str]]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/weights").write_text("")
    (tmp_path / "base/weights").chmod(file)
    (tmp_path / "base").chmod(directory)
    sources = Sources(((tmp_path / "base").stat(),), ((tmp_path / "base/weights").stat(),))
    (tmp_path / "base").chmod(0o755)
    before = os.umask(umask)
    try:
        build(tmp_path / "out", sources=sources)
    finally:
        os.umask(before)
    assert modes(tmp_path / "out") == want


def test_a_group_of_its_own_is_not_lent_to_another_group(tmp_path: Path) -> None:
    """What a group may read of the base, the group that the output has may only where all others may, too."""
    found = list(tmp_path.stat())
    foreign = [value + 1 if at == 5 else value for at, value in enumerate(found)]
    private, public = (os.stat_result([mode, *foreign[1:]]) for mode in (0o100640, 0o100644))
    before = os.umask(0)
    try:
        build(tmp_path / "private", sources=Sources((), (private,)))
        build(tmp_path / "public", sources=Sources((), (public,)))
    finally:
        os.umask(before)
    assert (modes(tmp_path / "private")[1], modes(tmp_path / "public")[1]) == ({"600"}, {"644"})


def test_an_empty_directory_that_was_made_private_gives_a_private_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(0o700)
    build(tmp_path / "out")
    assert modes(tmp_path / "out")[0] == "700"


# A directory that is written to in place -------------------------------------------------------------------------


def test_a_directory_has_one_writer_and_nothing_of_that_stays(tmp_path: Path) -> None:
    with lock.sole_writer(tmp_path):
        with pytest.raises(D2SurgeryError, match=f"process {os.getpid()} ") as error, lock.sole_writer(tmp_path):
            pass
        assert error.value.problems[0].code == "OUTPUT_IN_USE"
    with pytest.raises(KeyError), lock.sole_writer(tmp_path):
        raise KeyError
    (tmp_path / ".lock").write_text("what a kill left")
    with lock.sole_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_where_the_lock_will_be_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic"), lock.sole_writer(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
