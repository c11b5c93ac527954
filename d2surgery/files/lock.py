"""One writer per output. The lock is the kernel's (flock) and ends with the process, however that ends.

It holds between machines where the file system carries locks from one to the other (NFS; Lustre mounted with flock).
Where a file system has no locks at all, a writer that is alive on the same machine is noticed by its process id, one on
another machine is not.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2surgery.errors import refuse

_NAME = ".lock"
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def myself() -> dict[str, Any]:
    """This process, for whoever finds the output taken: pid, host, since."""
    return {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


def lock(fd: int, holder: Callable[[], Mapping[str, Any]], output: Path) -> None:
    """Lock an open file until it is closed. Raises D2SurgeryError OUTPUT_IN_USE, which names the holder.

    holder(): what the last writer said of itself, {} where it is not known.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no output is written that needs a lock
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(output, holder()) from None
    except OSError:  # there are no locks on this file system
        if _is_alive_here(said := holder()):
            raise _in_use(output, said) from None


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Nobody else writes to a directory meanwhile. Raises D2SurgeryError OUTPUT_IN_USE."""
    path = directory / _NAME
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _CAREFUL, 0o666)
        try:
            lock(fd, lambda: said_in(os.pread(fd, 1 << 12, 0)), directory)  # noqa: B023  # called at once
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                with suppress(OSError):  # a full disk: the lock holds without it
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, json.dumps(myself()).encode(), 0)
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # whoever held it before has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def said_in(text: bytes | str) -> dict[str, Any]:
    """What a writer said of itself there; {} where it said nothing."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and said.keys() >= {"pid", "host", "since"} else {}


def _in_use(output: Path, said: Mapping[str, Any]) -> Exception:
    who = f"process {said['pid']} on {said['host']}, since {said['since']}" if said else "another process"
    return refuse("OUTPUT_IN_USE", f"{who}, writes there", file=str(output))


def _is_alive_here(said: Mapping[str, Any]) -> bool:
    if said.get("host") != platform.node() or said["pid"] == os.getpid():
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, OverflowError):  # another user's, or no number at all
        return True
    return True
