"""Reading at a position of a file: by seeking, one thread at a time, where there is no pread (Windows)."""

import os
from threading import Lock

BINARY = getattr(os, "O_BINARY", 0)
"""To open with: Windows would turn line ends."""
_seeking = Lock()


def pread(fd: int, nbytes: int, position: int) -> bytes:
    """So many bytes at a position; fewer where the file ends before."""
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, position)
    with _seeking:
        os.lseek(fd, position, os.SEEK_SET)
        return os.read(fd, nbytes)


def pread_into(fd: int, buffer: memoryview, position: int) -> int:
    """Fill the buffer from a position, as far as one call of the system goes: how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], position)
    part = pread(fd, len(buffer), position)
    buffer[: len(part)] = part
    return len(part)
