"""Building a checkpoint beside the place where it will stand, and putting it there whole.

`.<name>.partial/` holds the files to be and `journal.jsonl`: the recipe, a line per process that wrote, a line per
finished shard. Whoever writes holds the lock on the journal, which leaves last, when the directory has its final name:
what is killed before that is finished by the same arguments.

Every file is made anew, by its name within the directory that was opened first: nothing is written through a link.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from d2surgery.errors import D2SurgeryError, refuse
from d2surgery.files.held import naming
from d2surgery.files.lock import lock, myself, said_in

JOURNAL = "journal.jsonl"
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows lacks these, and `claim` refuses to merge there
_A_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_DIRECTORY = _A_DIRECTORY | _NOFOLLOW
_OPENED = os.O_RDWR | os.O_APPEND | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY)  # no place for a directory
_OTHER = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)  # no directory with a journal
_BY_DESCRIPTOR = os.open in os.supports_dir_fd  # how a merge is published
_RECIPE = '{"adapter": "'  # how a journal begins


class Sources(NamedTuple):
    """What an output is made of, which it will not be more open than: some directories and the files in them."""

    directories: tuple[os.stat_result, ...] = ()
    files: tuple[os.stat_result, ...] = ()


class Partial:
    """A context, at whose end the lock is let go. `claim` before any work, `begin`, files, `publish`."""

    def __init__(self, out: Path, *, sync: bool, sources: Sources = Sources()) -> None:  # noqa: B008  # a tuple
        self.out = out.absolute() if out.name not in ("", "..") else out.resolve()
        self.path = self.out.parent / f".{self.out.name}.partial"
        self.finished: dict[str, dict[str, Any]] = {}  # shard file -> its journal line
        self.directory = self._parent = self._journal = -1  # descriptors
        self._given = str(out)
        self._sync = sync
        self._sources = sources
        self._published = False
        self._opened = ExitStack()

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with naming(self.path):
            self._opened.close()

    def claim(self, *, resume: bool) -> None:
        """Take what an earlier merge left, or see that there is nothing in the way. Makes nothing.

        Raises D2SurgeryError OUTPUT_EXISTS or OUTPUT_IN_USE, OSError where the system would not let us write.
        """
        if not _BY_DESCRIPTOR:
            message = "a merge is published by descriptors of directories, which this system has not"
            raise refuse("OTHER_SYSTEM", message, wanted="Linux, macOS, or WSL on Windows", got=sys.platform)
        self._published = _check_free(self.out, self._given)
        _check_parent(next(path for path in self.out.parents if os.path.lexists(path)))
        there = self.out if self._published else self.path
        if not os.path.lexists(there):
            return
        self._enter(there, adopt=resume)
        if not resume:
            what = "a merge that could not tidy up" if self._published else "an unfinished merge"
            message = f"{what} is there: continue it with --resume, or remove it"
            raise refuse("OUTPUT_EXISTS", message, file=str(there))
        with naming(there):
            _check_owner(self.directory, there)

    def begin(self, recipe: Mapping[str, Any], names: Collection[str]) -> bool:
        """Begin, or continue what the same recipe began; True where it is published already, and now tidied up.

        names: of all that will be written. Raises D2SurgeryError RESUME_MISMATCH, OUTPUT_EXISTS or OUTPUT_IN_USE.
        """
        first = json.dumps(recipe, sort_keys=True)
        if self._journal < 0:
            self._make()
        with naming(self.path / JOURNAL):
            text = _read(self._journal)
            lines = text.split("\n")[:-1]  # what follows the last \n is torn
            os.ftruncate(self._journal, text.rfind("\n") + 1)
        if not lines:
            self._append(f"{first}\n{_owner_line()}\n")
            return False
        if lines[0] != first:
            old, new = json.loads(lines[0]), json.loads(first)
            fields = ", ".join(key for key in sorted(old | new) if old.get(key) != new.get(key))
            raise refuse("RESUME_MISMATCH", f"these differ: {fields}", file=str(self.path))
        if self._published:
            self._tidy()
            return True
        foreign = sorted(n for n in _names(self.directory) - {JOURNAL, *names} if not n.startswith("."))
        if foreign:
            message = f"holds what this merge does not write, which would be published with it: {', '.join(foreign)}"
            raise refuse("OUTPUT_EXISTS", message, file=str(self.path))
        self.finished = _finished(lines[1:])
        self._append(f"{_owner_line()}\n")
        return False

    def append(self, line: str) -> None:
        """Put a line into the journal."""
        self._append(f"{line}\n")

    def create(self, name: str) -> int:
        """The descriptor of a new file in the place of what has its name."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.directory)
        return os.open(name, _NEW, 0o666 & self._allowed(self._sources.files), dir_fd=self.directory)

    def write(self, name: str, content: bytes) -> None:
        with naming(self.path / name):
            fd = self.create(name)
            try:
                _write(fd, content)
                self._fsync(fd)
            finally:
                os.close(fd)

    def publish(self) -> None:
        """Everything is on disk: take the final name, then drop the journal."""
        with naming(self.path):
            self._fsync_directory(self.directory)
            self._check_in_place(self.path)
        try:
            with naming(self.out):
                os.rename(self.path.name, self.out.name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            message = "something came to stand at the output path while it was merged: move it, then --resume"
            raise refuse("OUTPUT_EXISTS", message, file=self._given) from None
        with naming(self.out):
            self._fsync_directory(self._parent)
        self._tidy()

    def _tidy(self) -> None:
        with naming(self.out / JOURNAL):
            os.unlink(JOURNAL, dir_fd=self.directory)
            self._fsync_directory(self.directory)

    def _make(self) -> None:
        """A new directory, ours from its first moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stands = (self.out.stat(),) if self.out.exists() else ()  # an empty one, which it will replace
        mode = 0o777 & self._allowed((*self._sources.directories, *stands))
        try:
            self.path.mkdir(mode)
        except FileExistsError:
            raise refuse("OUTPUT_IN_USE", "another process has just begun there", file=str(self.path)) from None
        self._enter(self.path, adopt=True)

    def _enter(self, there: Path, *, adopt: bool) -> None:
        """Open a directory and its journal and lock it; adopt: an empty one is given a journal.

        Raises D2SurgeryError OUTPUT_EXISTS where it is none that a merge left, OUTPUT_IN_USE.
        """
        try:
            with naming(there):
                self._parent = self._open(there.parent, _A_DIRECTORY)
                self.directory = self._open(there.name, _DIRECTORY, within=self._parent)
                made = os.O_CREAT if adopt and not _names(self.directory) else 0
                self._journal = self._open(JOURNAL, _OPENED | made, within=self.directory)
        except OSError as error:
            if error.errno not in _OTHER:
                raise
            raise _not_ours(there) from None
        with naming(there / JOURNAL):
            found = os.fstat(self._journal)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise _not_ours(there)
            lock(self._journal, lambda: _last_owner(_read(self._journal)), there)
            text = _read(self._journal)
            alone = _names(self.directory) == {JOURNAL}  # killed before it had a line, or the disk was full
            if not (_is_recipe(text) or (alone and _RECIPE.startswith(text[: len(_RECIPE)]))):
                raise _not_ours(there)
            self._check_in_place(there)

    def _open(self, path: str | Path, flags: int, *, within: int | None = None) -> int:
        """A descriptor that is closed at the end of the context."""
        fd = os.open(path, flags, 0o666 & self._allowed(self._sources.files), dir_fd=within)
        self._opened.callback(os.close, fd)
        return fd

    def _check_in_place(self, there: Path) -> None:
        """Raises OUTPUT_IN_USE where another has published or moved it since it was opened."""
        try:
            named = os.stat(there.name, dir_fd=self._parent, follow_symlinks=False)
            os.stat(JOURNAL, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            raise refuse("OUTPUT_IN_USE", "another process has just finished or moved it", file=str(there)) from None
        if not os.path.samestat(named, os.fstat(self.directory)):
            raise refuse("OUTPUT_IN_USE", "another process has put something in its place", file=str(there))

    def _allowed(self, sources: Iterable[os.stat_result]) -> int:
        """The permissions that all sources grant; a group's where it is the group that the output will have."""
        parent = self.out.parent.stat()
        inherited = parent.st_mode & stat.S_ISGID or sys.platform == "darwin"
        group, allowed = parent.st_gid if inherited else os.getegid(), 0o777
        for found in sources:
            others = found.st_mode & 0o7
            of_group = found.st_mode & 0o70 if found.st_gid == group else others << 3
            allowed &= 0o700 | of_group | others
        return allowed

    def _append(self, text: str) -> None:
        with naming(self.path / JOURNAL):
            _write(self._journal, text.encode())
            self._fsync(self._journal)

    def _fsync(self, fd: int) -> None:
        if self._sync:
            os.fsync(fd)

    def _fsync_directory(self, fd: int) -> None:
        try:
            self._fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has no such thing
                raise


def _check_free(out: Path, given: str) -> bool:
    """Whether a whole merge stands at the output path that could not tidy up. Raises OUTPUT_EXISTS for all but nothing
    and an empty directory that a rename can replace."""
    if out.is_symlink():
        message = "the output path is a symbolic link: give the directory itself"
        raise refuse("OUTPUT_EXISTS", message, file=given, got=str(out.readlink()))
    if not os.path.lexists(out):
        return False
    if not out.is_dir():
        raise refuse("OUTPUT_EXISTS", "the output path is taken", file=given, got="a file")
    if os.path.lexists(out / JOURNAL):
        return True
    if any(out.iterdir()):
        raise refuse("OUTPUT_EXISTS", "the output path is taken", file=given, got="a directory that is not empty")
    if out.samefile(Path.cwd()):
        raise refuse("OUTPUT_EXISTS", "it is the working directory: give a name within it", file=given)
    if _is_mounted(out):
        message = "a file system is mounted there, which nothing can replace: give a name within it"
        raise refuse("OUTPUT_EXISTS", message, file=given)
    return False


def _check_parent(parent: Path) -> None:
    """Raises the OSError that writing would end with."""
    number = 0
    if not parent.is_dir():
        number = errno.ENOTDIR
    elif os.statvfs(parent).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    elif not os.access(parent, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(parent))


def _is_mounted(path: Path) -> bool:
    """A directory bound to another of the same file system is known to Linux alone."""
    table = Path("/proc/self/mountinfo")
    escaped = str(path.resolve()).replace("\\", r"\134").replace(" ", r"\040").replace("\t", r"\011")
    lines = table.read_text(errors="surrogateescape").splitlines() if table.exists() else []
    return path.is_mount() or any(line.split()[4] == escaped for line in lines)


def _check_owner(directory: int, path: Path) -> None:
    """Raises OUTPUT_EXISTS where somebody else's directory lies in the way: what is made in it has another owner."""
    name = f".{os.getpid()}.probe"
    fd = os.open(name, _NEW, 0o600, dir_fd=directory)
    try:
        ours, theirs = os.fstat(fd).st_uid, os.fstat(directory).st_uid
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=directory)
    if ours != theirs:
        raise refuse("OUTPUT_EXISTS", "another user's directory", file=str(path), got=f"user {theirs}")


def _names(directory: int) -> set[str]:
    return set(os.listdir(directory))  # pathlib knows no descriptors


def _not_ours(path: Path) -> D2SurgeryError:
    message = "is in the way, and no merge left it: it has no journal of one. Move it, or choose another output"
    return refuse("OUTPUT_EXISTS", message, file=str(path))


def _is_recipe(text: str) -> bool:
    """Whether a journal begins with a whole line that a merge wrote."""
    first, end, _ = text.partition("\n")
    try:
        return bool(end) and json.loads(first).keys() >= {"adapter", "versions", "shard_size"}
    except (ValueError, AttributeError, RecursionError):
        return False


def _finished(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Shard file -> its line, where that is in order: the others are written again."""
    found = {}
    for text in lines:
        try:
            line = json.loads(text)
            found[line["file"]] = {"inputs": dict(line["inputs"]), "outputs": dict(line["outputs"])}
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def _owner_line() -> str:
    return json.dumps({"writer": myself()})


def _last_owner(journal: str) -> dict[str, Any]:
    """What the last writer said of itself; {} where it has not said anything yet."""
    lines = [line for line in journal.split("\n")[:-1] if line.startswith('{"writer": ')]
    return said_in(lines[-1].removeprefix('{"writer": ').removesuffix("}")) if lines else {}


def _read(fd: int) -> str:
    """All of a file, from its beginning; a journal is ASCII."""
    parts: list[bytes] = []
    while part := os.pread(fd, 1 << 20, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts).decode("latin-1")


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
