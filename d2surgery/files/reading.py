"""Files of strangers: opened only where they are files, and JSON that is counted before anything is made of it."""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from d2surgery.errors import brief, refuse

MAX_CONFIG = 32_000_000  # bytes; the index of the 140,000 tensors of the largest models has 16 million
_MAX_GROUPS, _MAX_PARTS = 100_000, 500_000  # lists and objects of a config, and what stands in them
_MAX_TOML = 200_000  # bytes
_MAX_DOTS = 4_000_000  # of a line, squared, and of all added up: what tomllib's time for dotted keys grows with
_MAX_BEYOND_ASCII = 16_000_000  # bytes of text with other letters: Python then takes up to four bytes for each
_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def open_file(path: Path) -> BinaryIO:
    """The file, opened to be read: never what would wait for a writer or have no end.

    Raises D2SurgeryError: FILE_MISSING, FILE_UNREADABLE.
    """
    try:
        refuse_other(path, path.stat().st_mode)  # before a device is opened, which may do something
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except FileNotFoundError:
        raise refuse("FILE_MISSING", "no such file", file=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise refuse("FILE_UNREADABLE", getattr(error, "strerror", None) or str(error), file=str(path)) from None
    try:
        refuse_other(path, os.fstat(file.fileno()).st_mode)  # what it is now
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(path)) from None
        raise
    return file


def refuse_other(path: Path, mode: int) -> None:
    """Raises D2SurgeryError FILE_UNREADABLE for what is no file, by its mode."""
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _KINDS if test(mode)), "something else")
        raise refuse("FILE_UNREADABLE", f"not a file but {what}", file=str(path))


def read_small(path: Path, limit: int = MAX_CONFIG, code: str = "BAD_CONFIG") -> bytes:
    """All bytes of a file of at most `limit`. Raises D2SurgeryError: what open_file raises, `code` for a larger one."""
    with open_file(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise refuse("FILE_UNREADABLE", error.strerror or str(error), file=str(path)) from None
    if len(data) > limit:
        raise refuse(code, "too large", file=str(path), wanted=f"at most {limit} bytes")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. Raises D2SurgeryError BAD_CONFIG when it is anything else."""
    try:
        value = parse_json(read_small(path))
    except ValueError as error:
        raise refuse("BAD_CONFIG", f"not JSON: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise refuse("BAD_CONFIG", "wanted a JSON object", file=str(path), got=type(value).__name__)
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML document from disk. Raises D2SurgeryError BAD_CONFIG when it is anything else."""
    import tomllib  # which few need

    data = read_small(path, _MAX_TOML)
    try:
        if sum(line.count(b".") ** 2 for line in data.splitlines()) > _MAX_DOTS:
            raise ValueError("keys in keys without end")
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise refuse("BAD_CONFIG", f"not TOML: {brief(error, 200)}", file=str(path)) from None


def parse_json(data: bytes, *, groups: int = _MAX_GROUPS, parts: int = _MAX_PARTS) -> Any:
    """What JSON says, where that is little and no name stands twice in one object.

    Raises ValueError with the reason: also for more than `groups` lists and objects or `parts` commas, for nesting
    without end and for half a character (a lone surrogate), which nothing could write again. Twice is one of them.
    """
    if data.count(b"[") + data.count(b"{") > groups or data.count(b",") > parts:
        raise ValueError(f"more than {groups} lists and objects, or {parts} things in them")
    if len(data) > _MAX_BEYOND_ASCII and not data.isascii():
        raise ValueError(f"more than {_MAX_BEYOND_ASCII} bytes of text that is not ASCII")
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


class Twice(ValueError):
    """A name that stands twice in one object: readers differ in which they take."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs by name. Raises Twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise Twice(f"{twice[0]} stands twice" + (f", and {len(twice) - 1} more do" if len(twice) > 1 else ""))
    return found


def read_plain_yaml(path: Path) -> dict[str, str]:
    """The fields of a YAML file's top level that stand on one line, as text; {} where there is no such file.

    Raises D2SurgeryError as `read_small` does.
    """
    if not path.exists():
        return {}
    lines = read_small(path, 1_000_000).decode("utf-8", "replace").splitlines()
    pairs = (line.partition(":") for line in lines if line[:1].isalpha())
    return {name.strip(): value.partition(" #")[0].strip() for name, _, value in pairs if value.strip()}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files have the same content, of which little is held at once: a tokenizer may have 30 MB."""
    import filecmp

    filecmp.clear_cache()  # it takes equal times for equal content
    return filecmp.cmp(one, other, shallow=False)
