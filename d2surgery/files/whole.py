"""A small file that stands whole or not at all."""

import os
from pathlib import Path

PARTIAL = ".partial"
"""What the name of something unfinished ends in."""


def write_whole(path: Path, text: str) -> None:
    """UTF-8, in the place of what stands there, which stays where the writing fails. Nothing half-written is left.

    The name beside it is this process's own, so that two which write the same file do not meet.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # of an earlier process, or a link that somebody laid there
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
            file.write(text.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
