"""A small file that stands whole or not at all."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from d2surgery.errors import refuse

PARTIAL = ".partial"
"""What the name of something unfinished ends in."""
_PIECE = 1 << 20  # characters


def require_folder(path: Path) -> None:
    """The folder of a file to be written exists: asked before the work whose result goes there. Raises FILE_MISSING."""
    if not path.parent.is_dir():
        wanted = f"mkdir -p {shlex.quote(str(path.parent))}"
        raise refuse("FILE_MISSING", "there is no such folder to write to", file=str(path.parent), wanted=wanted)


def write_whole(path: Path, text: str) -> None:
    """UTF-8, as `write_whole_bytes`; a piece at a time, for a page may have 20 MB."""
    write_whole_bytes(path, (text[at : at + _PIECE].encode() for at in range(0, len(text), _PIECE)))


def write_whole_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """In the place of what stands there, which stays where the writing fails. Nothing half-written is left.

    The name beside it is this process's own, so that two which write the same file do not meet.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    partial.unlink(missing_ok=True)  # of a process that had this number and was killed
    try:
        with partial.open("xb") as file:  # a file of its own: no link is followed
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
