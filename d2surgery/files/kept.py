"""The sha256 of stored tensors, kept from one run to the next: a base is hashed once, however often it is merged onto.

A file is known by device, inode, size, mtime and ctime, as `held` knows it. They say nothing of a disk that gives back
other bytes than it was given; whoever wants to know that hashes again.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from d2surgery.files.header import TensorInfo
from d2surgery.files.held import Held
from d2surgery.files.whole import write_whole

_TICK = 2  # seconds: a file written to less long before it was opened may be written to again with the same times
_MOST = 512  # files whose hashes are kept, those last used


class KeptHashes:
    """`known`: the sha256 of tensors that an earlier run hashed (none, to hash all `again`); `unknown`: the others;
    `keep` adds to what is known.

    What cannot be read or written in the user's cache costs the time of hashing again, and is not said.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], *, again: bool = False) -> None:
        old, folder = time.time() - _TICK, cache_folder()
        self._files: dict[Path, dict[str, TensorInfo]] = {}
        for name, info in tensors.items():
            if folder and info.held is not None and not info.heads and info.held.found.st_ctime < old:
                self._files.setdefault(_place(folder, info.held), {})[name] = info
        self._kept = {place: _read(place) for place in self._files}
        self.known = {
            name: self._kept[place][where]
            for place, infos in self._files.items()
            for name, info in infos.items()
            if (where := _where(info)) in self._kept[place] and not again
        }
        self.unknown = {name: info for name, info in tensors.items() if name not in self.known}

    def keep(self, digests: Mapping[str, str]) -> None:
        """Remember these of the tensors, by name. Their files are as they were when this object was made."""
        with suppress(OSError):
            for place, infos in self._files.items():
                new = {_where(info): digests[name] for name, info in infos.items() if name in digests}
                if (now := self._kept[place] | new) != self._kept[place]:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(place, json.dumps(now))
                    _forget(place.parent)


def cache_folder() -> Path | None:
    """Where the user's programs keep what they can make again; None for a user without a home."""
    usual = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")  # the latter on Windows
    try:
        folder = Path(usual) if usual else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "d2surgery" if folder.is_absolute() else None


def _place(folder: Path, held: Held) -> Path:
    """The file of the cache that stands for one as it was found."""
    found = held.found
    known_by = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return folder / "sha256" / f"{hashlib.sha256(repr(known_by).encode()).hexdigest()[:32]}.json"


def _where(info: TensorInfo) -> str:
    return f"{info.start}-{info.stop}"


def _read(place: Path) -> dict[str, str]:
    """What is kept there: {"first byte-last": digest}; nothing where there is no such file, or it is none of ours."""
    try:
        kept = json.loads(place.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {key: digest for key, digest in kept.items() if isinstance(digest, str) and len(digest) == 64}


def _forget(folder: Path) -> None:
    """Those that were used longest ago, where there are too many."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST]:
        file.unlink(missing_ok=True)
