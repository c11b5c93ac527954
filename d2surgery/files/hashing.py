"""The sha256 of whole files, found by a thread: while torch is imported a core has nothing else to do."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

_PIECE = 1 << 24  # bytes: an import gives the interpreter to another thread seldom, and this asks for it once a piece


class Hashing:
    """Of these files in their order, begun when it is made."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._found: list[str] = []
        self._failure: OSError | None = None
        self._thread = Thread(target=self._hash, daemon=True)  # whatever ends the program need not wait for it
        self._thread.start()

    def wait(self) -> list[str]:
        """Raises OSError where a file cannot be read."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._found

    def _hash(self) -> None:
        try:
            for file in self._files:
                digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
                with file.open("rb", buffering=0) as stream:
                    while count := stream.readinto(piece):
                        digest.update(piece[:count])
                self._found.append(digest.hexdigest())
        except OSError as error:
            self._failure = error
