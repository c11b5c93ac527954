"""Streaming safetensors output: a header that is known before the data, bytes at offsets, hashes, fsync.

Where the files stand meanwhile, and how they come to stand at their place: see `partial`.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from d2surgery.files.header import BITS, INDEX
from d2surgery.files.held import naming
from d2surgery.files.stored import let_go
from d2surgery.files.tensors import as_bytes

FLUSH = 1 << 26  # bytes written before the disk is asked to begin: what it has taken can be used again


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its tensors in order of position, the header, the position of each tensor."""

    file: str
    header: bytes
    starts: Mapping[str, int]
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def shards(entries: Iterable[Entry], limit: int) -> list[Shard]:
    """Cut entries, in their order, into files of at most `limit` bytes (a larger tensor has its own file)."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    count = len(groups)
    name = "model.safetensors" if count == 1 else "model-{:05d}-of-{:05d}.safetensors"
    return [_shard(name.format(number, count), group) for number, group in enumerate(groups, 1)]


def index_of(written: Iterable[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    files = list(written)
    entries = [entry for shard in files for entry in shard.entries]
    parameters = sum(entry.nbytes * 8 // BITS[entry.dtype] for entry in entries)
    metadata = {"total_parameters": parameters, "total_size": sum(entry.nbytes for entry in entries)}
    return {"metadata": metadata, "weight_map": {e.name: shard.file for shard in files for e in shard.entries}}


def _shard(file: str, entries: list[Entry]) -> Shard:
    # Wider dtypes first, as safetensors itself does: every tensor then starts at a multiple of its item size.
    ordered = sorted(entries, key=lambda entry: -BITS[entry.dtype])
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts: dict[str, int] = {}
    for entry in ordered:
        starts[entry.name] = position
        offsets = [position, position + entry.nbytes]
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + start for name, start in starts.items()}, tuple(ordered))


class ShardWriter:
    """Writes one shard's tensors piece by piece and hashes them: each tensor's pieces in order, by one thread.

    fd: of the empty file at the path, which is closed at the end; None: one is made. An OSError names the path.
    """

    def __init__(self, path: Path, shard: Shard, *, hashes: bool, sync: bool, fd: int | None = None) -> None:
        self.path = path
        self.shard = shard
        self.hashes: dict[str, Any] = {e.name: hashlib.sha256() for e in shard.entries} if hashes else {}
        self._positions = dict(shard.starts)
        self._sync = sync
        self._unsynced = 0
        self._lock = threading.Lock()
        self._flusher = threading.Thread()  # one that never ran
        self._failure: OSError | None = None
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666) if fd is None else fd
        try:
            with naming(path):
                _reserve(self._fd, shard.nbytes)
            self._write(shard.header, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, piece: Tensor) -> None:
        data = as_bytes(piece)
        if self.hashes:
            self.hashes[name].update(data)
        self._write(data, self._positions[name])
        self._positions[name] += len(data)
        with self._lock:
            self._unsynced += len(data)
            if self._sync and self._unsynced >= FLUSH and not self._flusher.is_alive():
                self._unsynced = 0  # the disk works while the tiles are computed, so that close has little to wait for
                self._flusher = threading.Thread(target=self._flush)
                self._flusher.start()

    def close(self) -> dict[str, str]:
        """Returns the sha256 of each tensor, {} when not hashing."""
        ends = {entry.name: self.shard.starts[entry.name] + entry.nbytes for entry in self.shard.entries}
        if self._positions != ends:
            self.abandon()
            wrong = [name for name, end in ends.items() if self._positions[name] != end]
            raise RuntimeError(f"not written to their last byte, or beyond: {', '.join(wrong)}")
        try:
            with naming(self.path):
                if self._sync:
                    os.fsync(self._fd)
        finally:
            self.abandon()
        if self._failure is not None:
            raise self._failure
        return {name: digest.hexdigest() for name, digest in self.hashes.items()}

    def abandon(self) -> None:
        """Close the file as it stands."""
        if self._flusher.ident is not None:
            self._flusher.join()
        with naming(self.path):
            os.close(self._fd)

    def _flush(self) -> None:
        try:
            with naming(self.path):
                os.fdatasync(self._fd)
                let_go(self._fd)
        except OSError as error:  # the kernel reports a lost write once, and here is where it was told
            self._failure = error

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        with naming(self.path):
            while view:
                count = os.pwrite(self._fd, view, position)
                view, position = view[count:], position + count


def _reserve(fd: int, nbytes: int) -> None:
    """A full disk is found now, and the kernel does not have to find blocks page by page: 5 times faster here."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
            raise


def free_space(path: Path) -> int:
    """Bytes that the file system has free where a path is or would be."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def hash_tensors(path: Path, shard: Shard) -> dict[str, str]:
    """The sha256 of each tensor in a finished shard, read back from disk; "" where the file is not this shard's."""
    digests = {entry.name: "" for entry in shard.entries}
    found = path.lstat() if os.path.lexists(path) else None
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size != shard.nbytes:
        return digests  # a file with another name, too, may have these bytes now and others later
    with naming(path), path.open("rb") as file:
        if file.read(len(shard.header)) != shard.header:
            return digests
        for entry in shard.entries:
            file.seek(shard.starts[entry.name])
            digest, left = hashlib.sha256(), entry.nbytes
            while left and (piece := file.read(min(left, 1 << 22))):
                digest.update(piece)
                left -= len(piece)
            digests[entry.name] = digest.hexdigest()
    return digests


def index_file(written: list[Shard]) -> dict[str, bytes]:
    """The index's name and content; nothing for a single file, which needs none."""
    return {INDEX: json.dumps(index_of(written), indent=2).encode()} if len(written) > 1 else {}
