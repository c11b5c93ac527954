"""What a run writes stands whole or not at all, and a disk that is full is said in one way."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.lock import sole_writer
from d2surgery.files.reading import parse_json, read_small
from d2surgery.files.whole import PARTIAL
from d2surgery.formats.saving import UNFINISHED

PREFIX = "checkpoint-"
CONFIG = "train.toml"
METRICS = "metrics.jsonl"
BEST = "best"

_MAX_METRICS = 1 << 28  # bytes; a line has about 160
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk's end, the quota's, the limit of a file
_WORDS = (  # Rust's writer, of safetensors; and torch's, which gives no number
    *(f"(os error {number})" for number in _NUMBERS), "No space left",
    "file write failed", "PytorchStreamWriter failed", "iostream error", "unexpected pos",
)  # fmt: skip


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = [path for path in out.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps after which it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def keep_newest(out: Path, keep: int) -> None:
    """Remove the older checkpoints. Each leaves its name first: a kill leaves none that is a part of one."""
    for old in checkpoints(out)[:-keep]:
        remove(out, old)


def remove(out: Path, checkpoint: Path) -> None:
    """Remove a checkpoint of a run, by way of where unfinished ones are."""
    (out / PARTIAL).mkdir(exist_ok=True)
    shutil.rmtree(checkpoint.rename(out / PARTIAL / f"old-{checkpoint.name}"))


def check_whole(checkpoint: Path) -> None:
    """Raises DAMAGED_CHECKPOINT with every file that is missing or cut short: without some, Trainer would go on."""
    random = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random]
    bad = [path for path in archives if not is_zipfile(path)]
    state = checkpoint / "trainer_state.json"
    bad += [] if read_json(state) else [state]
    raise_errors(
        Problem(code="DAMAGED_CHECKPOINT", message="cut short" if path.exists() else "missing", file=str(path))
        for path in bad
    )


def read_json(path: Path) -> dict[str, Any]:
    """What was written there, nothing where it is missing or cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that a kill cut short is left out, as is what no run wrote."""
    path = out / METRICS
    lines = read_small(path, _MAX_METRICS).splitlines() if path.exists() else []
    return [line for line in map(_parsed, lines) if type(line.get("step")) is int]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def written_alone(out: Path, base: str) -> Iterator[None]:
    """Make the output of a run, in which nobody else writes meanwhile, and clear away what a kill left of this one's.

    Raises D2SurgeryError OUTPUT_IN_USE, and OUTPUT_EXISTS for what is not a run's.
    """
    if out.exists() and Path(base).exists() and out.samefile(base):
        message = "the output is the base's directory: an adapter in it would be taken for a part of the base"
        raise refuse("OUTPUT_EXISTS", message, file=str(out))
    with _folder(out), sole_writer(out):
        half = [path for path in (out / PARTIAL, *out.glob(f"{UNFINISHED}*{PARTIAL}")) if os.path.lexists(path)]
        for path in half:
            if path.is_symlink() or not path.is_dir() or not (out / CONFIG).exists():
                raise refuse("OUTPUT_EXISTS", "is in the way, and no run left it: move it", file=str(path))
            shutil.rmtree(path)
        yield


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make it; what fails before anything is in it leaves none."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # something is in it
                out.rmdir()
        raise


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """Every writer's own way of saying that the disk is full becomes DISK_FULL, which names what is whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
        if getattr(error, "errno", None) not in _NUMBERS and not any(words in text for words in _WORDS):
            raise
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        whole = checkpoints(out)
        last = f"{whole[-1].name} is whole" if whole else "there is no checkpoint yet"
        raise refuse("DISK_FULL", f"training stopped; {last}", file=str(out)) from None
