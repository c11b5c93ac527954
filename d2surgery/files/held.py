"""Files as they were found: what is read later is what was looked at first, or it is said that it is not.

A held file is opened once and read from that descriptor, so what takes its name meanwhile is never read. Writing into
it is seen by its times: ctime is the kernel's own, and nobody sets it back.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem
from d2surgery.files.positioned import BINARY, pread
from d2surgery.files.reading import refuse_other


class Seen:
    """A file's size and times when it was found."""

    def __init__(self, path: Path, found: os.stat_result | None = None) -> None:
        self.path = path
        self.found = path.stat() if found is None else found

    @property
    def stamp(self) -> tuple[str, int, int, int]:
        """Its name, size, mtime and ctime in ns: the same for the same bytes, until somebody touches the file."""
        return (self.path.name, *_times(self.found))

    def change(self) -> str:
        """What has become of it since; "" where nothing has."""
        try:
            now = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return "is gone"
        return self._told(now)

    def _told(self, now: os.stat_result) -> str:
        return "" if _times(now) == _times(self.found) else "was written to or replaced"


class Held(Seen):
    """A file that stays open for as long as this object lives.

    Raises OSError where it cannot be opened, D2SurgeryError FILE_UNREADABLE where it is no file.
    """

    def __init__(self, path: Path) -> None:
        self.fd = _open(path)
        with naming(path):
            super().__init__(path, os.fstat(self.fd))
        refuse_other(path, self.found.st_mode)  # as it is now
        if hasattr(os, "posix_fadvise"):  # the kernel then reads twice as far ahead of who reads in order
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __del__(self, close: Any = os.close) -> None:
        with suppress(OSError, AttributeError):  # what was only read is not lost; a file that was not there has no fd
            close(self.fd)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, has a descriptor of its own."""
        return Held, (self.path,)

    def read(self, nbytes: int, position: int) -> bytes:
        """So many bytes, fewer where the file ends before."""
        parts = []
        with naming(self.path):
            while nbytes and (part := pread(self.fd, nbytes, position)):
                parts.append(part)
                nbytes, position = nbytes - len(part), position + len(part)
        return b"".join(parts)

    def _told(self, now: os.stat_result) -> str:
        return super()._told(now) if os.path.samestat(now, self.found) else "was replaced"


def changes(files: Iterable[Seen], code: str) -> list[Problem]:
    """A problem for every file that is not as it was found."""
    told = ((file, file.change()) for file in files)
    return [Problem(code=code, message=change, file=str(file.path)) for file, change in told if change]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses is said of this file: calls by descriptor do not say which one."""
    try:
        yield
    except OSError as error:
        if not (isinstance(error.filename, str) and Path(error.filename).is_absolute()):
            error.filename, error.filename2 = str(path), None
        raise


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _open(path: Path) -> int:
    refuse_other(path, path.stat().st_mode)  # before a device is opened, which may do something
    how = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | BINARY
    try:
        return os.open(path, how)
    except OSError as error:
        if error.errno != errno.EMFILE or sys.platform == "win32":  # Windows has no such limit
            raise
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a model of many shards
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return os.open(path, how)
