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
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
