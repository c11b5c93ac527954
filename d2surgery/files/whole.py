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
    partial.unlink(missing_ok=True)  # of a process that had this number and was killed
    try:
        with partial.open("x", encoding="utf-8") as file:  # a file of its own: no link is followed
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
