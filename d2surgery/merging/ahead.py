"""Hashing stored tensors before their bytes are needed: while torch is imported, the other cores have nothing to do."""

import hashlib
import threading
from collections.abc import Mapping
from types import TracebackType

from d2surgery.header import TensorInfo

_PIECE = 1 << 22  # an import gives the interpreter away every few milliseconds: small pieces would wait more than work


class HashAhead:
    """Hashes tensors in a thread of its own, one after the other, from the moment it is made until `stop`."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._digests: dict[str, str] = {}
        self._failures: list[Exception] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, str]:
        """The sha256 of every tensor that was hashed to its end. Raises OSError where one could not be read."""
        self._stopping.set()
        self._thread.join()
        if self._failures:
            raise self._failures[0]
        return self._digests

    def __enter__(self) -> "HashAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            buffer = memoryview(bytearray(_PIECE))
            for name, info in self._tensors.items():
                if not self._hash(name, info, buffer):
                    return
        except Exception as error:
            self._failures.append(error)

    def _hash(self, name: str, info: TensorInfo, buffer: memoryview) -> bool:
        digest, left = hashlib.sha256(), info.nbytes
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            while left:
                count = 0 if self._stopping.is_set() else file.readinto(buffer[:left])
                if not count:
                    return False  # asked to stop, or the file became shorter: who reads the tensor will say so
                digest.update(buffer[:count])
                left -= count
        self._digests[name] = digest.hexdigest()
        return True
