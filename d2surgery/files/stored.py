"""The bytes of a stored tensor, as the file has them. No torch."""

import os
from dataclasses import replace

from d2surgery.errors import D2SurgeryError, refuse
from d2surgery.files.header import TensorInfo
from d2surgery.files.held import Held
from d2surgery.files.positioned import pread_into


def read_stored(info: TensorInfo, start: int, target: memoryview, *, once: bool = False) -> None:
    """Fill the buffer with the bytes of a stored tensor from position `start` within it.

    once: they will not be read again, so the kernel need not keep them.

    Raises D2SurgeryError TRUNCATED_FILE, or FILE_UNREADABLE where the disk fails.
    """
    try:
        held = info.held or Held(info.file)
        read_into(held.fd, target, info.start + start)
    except OSError as error:
        raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(info.file)) from None
    except D2SurgeryError as error:
        raise D2SurgeryError(*(replace(problem, file=str(info.file)) for problem in error.problems)) from None
    if once:
        let_go(held.fd, info.start + start, len(target))


def read_into(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from a file position with pread: no mapping, so reading costs no resident memory."""
    done = 0
    while done < len(buffer):
        count = pread_into(fd, buffer[done:], offset + done)
        if not count:
            raise refuse("TRUNCATED_FILE", "the file became shorter while it was read")
        done += count


def let_go(fd: int, start: int = 0, nbytes: int = 0) -> None:
    """Let the kernel drop its copy of a part of a file (0 bytes: to the end), and begin writing what is not on disk.

    Files as large as a model push all else out of its cache, and taking fresh memory for them can cost more than the
    arithmetic: 2 s a GB on a virtual machine whose host has lent that memory to others.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)
