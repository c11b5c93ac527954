"""Hashing stored tensors before their bytes are needed: while torch is imported, the other cores have nothing to do.

Done by a process of its own, which runs this file: an import rarely lets another thread have the interpreter.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the other process has this file and the standard library
    from d2surgery.files.header import TensorInfo

_PIECE = 1 << 20  # bytes
_MOST = 1024  # tensors: more than an import leaves time for, and their digests fit into a pipe
_DIGEST = hashlib.sha256().digest_size


class HashAhead:
    """Hashes tensors one after the other, from the moment it is made until `stop`."""

    def __init__(self, tensors: "Mapping[str, TensorInfo]") -> None:
        self._names = list(islice(tensors, _MOST))
        self._wanted, held = _asked([tensors[name] for name in self._names])
        self._process = _started(self._wanted, held) if self._names else None

    def stop(self) -> dict[str, str]:
        """The sha256 of every tensor that was hashed to its end."""
        if self._process is None or self._process.stdout is None:
            return {}
        self._process.kill()
        with self._process, self._process.stdout as pipe:
            said, self._process = pipe.read(), None
        asked, *digests = [said[at : at + _DIGEST] for at in range(0, len(said), _DIGEST)] or [b""]
        if asked != hashlib.sha256(self._wanted.encode()).digest():
            return {}
        return {name: digest.hex() for name, digest in zip(self._names, digests, strict=False)}

    def __enter__(self) -> "HashAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()


def _asked(tensors: "list[TensorInfo]") -> tuple[str, list[int]]:
    """In JSON what to hash, and the descriptors that it names: those from which the tensors will be read, too."""
    sources = [info.held.fd if info.held else str(info.file) for info in tensors]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    each = [(numbers[source], info.start, info.nbytes) for source, info in zip(sources, tensors, strict=True)]
    return json.dumps([list(numbers), each]), [source for source in numbers if isinstance(source, int)]


def _started(wanted: str, held: list[int]) -> "subprocess.Popen[bytes] | None":
    """None where there is no Python to do it: the tensors are then hashed when they are read.

    So is what that process cannot read; whoever reads it says what is wrong.
    """
    if not sys.executable or hasattr(sys, "frozen"):
        return None
    command = [sys.executable, "-I", "-S", __file__, wanted]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=held,
        )
    except OSError:  # no more processes, or none allowed
        return None


def hash_all(files: Sequence[str | int], tensors: Iterable[tuple[int, int, int]]) -> None:
    """Write the digest of each tensor (file, first byte, number of bytes) to standard output, once it is known.

    A file is a path or a descriptor, whose position is left alone: another process may read it, too.
    """
    buffer = memoryview(bytearray(_PIECE))
    opened = [file if isinstance(file, int) else os.open(file, os.O_RDONLY) for file in files]
    for number, start, left in tensors:
        digest = hashlib.sha256()
        while left:
            count = os.preadv(opened[number], [buffer[:left]], start)
            if not count:
                return  # the file became shorter
            digest.update(buffer[:count])
            start, left = start + count, left - count
        sys.stdout.buffer.write(digest.digest())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    # First what was asked: where Python is embedded, sys.executable may be a program that says something else.
    sys.stdout.buffer.write(hashlib.sha256(sys.argv[1].encode()).digest())
    hash_all(*json.loads(sys.argv[1]))
