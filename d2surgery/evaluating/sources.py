"""Where items come from: JSON or JSON lines, plain or gzip; tables and the hub's datasets, through `datasets`."""

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d2surgery.errors import D2SurgeryError, Problem, refuse
from d2surgery.files.reading import open_file, read_small

_SHOWN, ENOUGH = 20, 20_000  # malformed items that an error lists, and that are looked for: a wrong file has thousands
_MAX_BYTES, _MAX_GROUPS, _PIECE = 128_000_000, 1_000_000, 1 << 20  # of a file; its lists and objects, or its lines
_LFS = b"version https://git-lfs"
_TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_DATASET = re.compile(  # and no mistyped path of a file
    r"(?:hf:/{1,2})?(?:datasets/)?(\w[\w.-]*/\w[\w.-]*)(?<!\.json)(?<!\.jsonl)(?<!\.gz)(?<!\.txt)(?:@(\w[\w./-]*))?"
    r"((?::[\w.-]+(?:\[[\w%:-]*\])?){0,2})",
    re.ASCII,
)


class Entry(NamedTuple):
    value: Any
    file: Path
    place: str  # "line 3", "item 3"

    def problem(self, message: str) -> Problem:
        return Problem(code="BAD_DATA", message=message, file=f"{self.file}, {self.place}")


def raise_first(problems: list[Problem]) -> None:
    """All of them, or the first and how many follow."""
    if len(problems) > _SHOWN:
        rest = Problem(
            code="BAD_DATA",
            message=f"and {len(problems) - _SHOWN} more{', and that is not all' * (len(problems) >= ENOUGH)}",
            file=problems[0].file.split(",")[0],
        )
        problems = [*problems[:_SHOWN], rest]
    if problems:
        raise D2SurgeryError(*problems)


def read_text(path: Path) -> str:
    data = read_small(path, _MAX_BYTES, "BAD_DATA")
    if data.startswith(_LFS):
        raise refuse("LFS_POINTER", "not the data", file=str(path))
    try:
        text = (_decompressed(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (EOFError, zlib.error) as error:
        raise refuse("BAD_DATA", f"the gzip file is damaged: {error}", file=str(path)) from None
    except UnicodeDecodeError as error:
        raise refuse("BAD_DATA", f"not UTF-8 text: byte {error.start}", file=str(path)) from None
    except OverflowError:
        raise refuse("BAD_DATA", "too large", file=str(path), wanted=f"at most {_MAX_BYTES} bytes") from None
    if not text.strip():
        raise refuse("BAD_DATA", "empty", file=str(path))
    return text


def _decompressed(data: bytes) -> bytes:
    """Of gzip. Raises OverflowError where that would be more than `_MAX_BYTES`, which is counted before it is kept."""
    total = sum(map(len, _pieces(data)))
    if total > _MAX_BYTES:
        raise OverflowError
    return b"".join(_pieces(data))


def _pieces(data: bytes) -> Iterator[bytes]:
    """A piece at a time, until there are more than `_MAX_BYTES`."""
    total = 0
    while data.strip(b"\0"):  # one member after another
        member = zlib.decompressobj(wbits=31)
        while not member.eof and total <= _MAX_BYTES:
            piece = member.decompress(data, _PIECE)
            if not piece and not member.unconsumed_tail and not member.eof:
                raise EOFError("it ends before its end")
            yield piece
            data, total = member.unconsumed_tail, total + len(piece)
        data = member.unused_data if total <= _MAX_BYTES else b""


def entries(source: str | os.PathLike[str]) -> Iterator[Entry]:
    """What stands in a file of JSON (a list, by number) or of JSON lines (by line), plain or gzip.

    Through the library datasets also in a table (.parquet, .csv, .arrow) and in a dataset of the hub, by row:
    org/name[@revision][:config][:split]. The split is train unless another is named, such as test or train[:5000].
    """
    path, dataset = Path(source), _DATASET.fullmatch(os.fspath(source))
    if path.suffix in _TABLES:
        with open_file(path):  # or it is said that there is none
            yield from _rows(source, _TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
    elif dataset is not None and not path.exists():
        name, revision, more = dataset.groups()
        *config, split = re.findall(r":([^:\[]+(?:\[[^\]]*\])?)", more) or ["train"]
        yield from _rows(source, name, *config, split=split, revision=revision)
    else:
        yield from _from_json(path)


def _rows(source: str | os.PathLike[str], *names: str, **choices: Any) -> Iterator[Entry]:
    local = "data_files" in choices
    try:
        import datasets
    except ImportError:
        missing = "the Python package datasets, which reads it, is not installed"
        what = missing if local else f"there is no such path, and if it is a dataset of the hub, {missing}"
        raise refuse("NO_DATASETS", what, file=os.fspath(source)) from None
    datasets.disable_progress_bars()
    try:
        for number, row in enumerate(datasets.load_dataset(*names, **choices), 1):
            if number > _MAX_GROUPS:
                wanted = "a part of it, such as org/name:train[:100000]"
                raise refuse("BAD_DATA", f"more than {_MAX_GROUPS} rows", file=os.fspath(source), wanted=wanted)
            yield Entry(row, Path(source), f"row {number}")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        code, what = ("BAD_DATA", "not such a table") if local else ("HUB_UNREACHABLE", "no such path, nor a dataset")
        reason = " ".join(str(error).split())[:300]
        raise refuse(code, f"{what}: {reason}", file=os.fspath(source)) from None


def _from_json(path: Path) -> Iterator[Entry]:
    text = read_text(path)
    if text.count("[") + text.count("{") > _MAX_GROUPS or text.count("\n") > _MAX_GROUPS:
        raise refuse("BAD_DATA", f"more than {_MAX_GROUPS} items", file=str(path))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise refuse("BAD_DATA", f"not JSON: {error.msg}", file=f"{path}, line {error.lineno}") from None
        yield from _lines(text, path)
        return
    except RecursionError:
        raise refuse("BAD_DATA", "nested too deeply", file=str(path)) from None
    except ValueError as error:
        raise refuse("BAD_DATA", f"not JSON: {error}", file=str(path)) from None
    values = whole if isinstance(whole, list) else [whole]
    if not values:
        raise refuse("BAD_DATA", "an empty list", file=str(path))
    yield from (Entry(value, path, f"item {number}") for number, value in enumerate(values, 1))


def _lines(text: str, path: Path) -> Iterator[Entry]:
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028, which JSON allows in a string
        if not line.strip():
            continue
        try:
            entries.append(Entry(json.loads(line), path, f"line {number}"))
        except json.JSONDecodeError as error:
            problems.append(Entry(None, path, f"line {number}").problem(f"not JSON: {error.msg}"))
        except RecursionError:
            problems.append(Entry(None, path, f"line {number}").problem("nested too deeply"))
        except ValueError as error:  # a number of too many digits
            problems.append(Entry(None, path, f"line {number}").problem(f"not JSON: {error}"))
        if len(problems) >= ENOUGH:
            break
    raise_first(problems)
    yield from entries
