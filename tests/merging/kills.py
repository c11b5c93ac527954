"""Kill merges and training runs, resume them, compare every byte with those of an undisturbed one.

    python tests/merging/kills.py [--merges 160] [--runs 40] [--seed 0]

The first half of the merges is killed before a call to the system (each of a merge's calls in turn), the second at
random times; what resumes them is killed again, half of the time. So are the runs of training. Each is a child of this
process by fork, killed by SIGKILL: torch is imported once. Ends with 0 where every byte was the same, with 1 otherwise.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import d2surgery.files.writer
import d2surgery.merging.tiles
from d2surgery import KINDS, Adapter, from_adapters, merge, save
from d2surgery.files.tensors import DTYPES

CALLS = (
    "open", "mkdir", "posix_fallocate", "write", "pwrite", "fsync", "fdatasync", "close", "unlink", "rename",
    "ftruncate", "preadv",
)  # fmt: skip
STORED = {"BF16": "F32", "F16": "BF16", "F32": "BF16"}  # dtype of the base -> another for the output
SHARD = 8000


class Work(NamedTuple):
    """What is done and killed: run(out, resume) writes to `out`."""

    name: str
    run: Callable[[Path, bool], Any]
    whole: dict[str, bytes]


# What is killed --------------------------------------------------------------------------------------------------


def merges(folder: Path, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Work]:
    """Every kind on a base of every dtype, into the same and another."""
    d2surgery.merging.tiles.TILE_ENTRIES = 256  # several tiles of every tensor
    d2surgery.files.writer.FLUSH = 2000
    for kind in kinds:
        for stored, other in STORED.items():
            for dtype in (None, other):
                name = f"{kind} {stored} {dtype or 'same'}"
                base, adapter = _inputs(folder / name, kind, stored)

                def run(
                    out: Path, resume: bool, base: Path = base, adapter: Path = adapter, dtype: str | None = dtype
                ) -> None:
                    merge(base, adapter, out, dtype=dtype, shard_size=SHARD, resume=resume)

                run(folder / name / "whole", False)
                yield Work(name, run, contents(folder / name / "whole"))


def _inputs(folder: Path, kind: str, dtype: str) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.proj.weight": torch.randn(40, 24, generator=generator) for i in range(5)}
    (folder / "base").mkdir(parents=True)
    save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text('{"model_type": "x"}')
    (folder / "base/tokenizer.json").write_text("{}")
    adapters: dict[str, Adapter] = {}
    for name, weight in weights.items():
        fresh = KINDS[kind].init(weight, rank=2, scaling=0.5, generator=generator)
        moved = {slot: t + 0.05 * torch.randn(t.shape, generator=generator) for slot, t in fresh.slots().items()}
        adapters[name.removesuffix(".weight")] = replace(fresh, **moved)
    save(from_adapters(adapters), folder / "adapter")
    return folder / "base", folder / "adapter"


def runs(folder: Path, kinds: tuple[str, ...] = ("lora", "duallora")) -> Iterator[Work]:
    """Runs of training of eight steps with three checkpoints."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from trained import config_of, write_base, write_items

    from d2surgery.training.loop import train

    write_base(folder / "base")
    write_items(folder / "items.json")
    for kind in kinds:
        config = config_of(folder, kind)

        def run(out: Path, resume: bool, config: Any = config) -> None:
            train(replace(config, output=str(out)), resume=resume)

        in_a_child(partial(run, folder / f"whole {kind}", False), never)
        yield Work(f"train {kind}", run, contents(folder / f"whole {kind}"))


def contents(directory: Path) -> dict[str, bytes]:
    """Of the files that are the same each time: those of training that hold times and paths are not."""
    differ = ("train.toml", "metrics.jsonl", "training_args.bin", "trainer_state.json")
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in differ]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# Killing ---------------------------------------------------------------------------------------------------------


def never() -> None:
    pass


def before_call(number: int) -> Callable[[], None]:
    """Arms this process: it dies before its call of that number that may change something on the disk."""

    def arm() -> None:
        calls, lock = count(), threading.Lock()

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **options: Any) -> Any:
                with lock:
                    if next(calls) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return called

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

    return arm


def after(seconds: float) -> Callable[[], None]:
    """Arms this process: it dies then, whatever it does."""

    def arm() -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    return arm


def in_a_child(work: Callable[[], Any], arm: Callable[[], None]) -> bool:
    """Whether it came to its end; False where it was killed. Any other end is an error."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            arm()
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("what should have been resumed ended with an error")
    return True


def kill_and_resume(work: Work, out: Path, arms: list[Callable[[], None]]) -> tuple[int, str]:
    """How many kills came in time, and what is wrong, "" where nothing is."""
    kills = 0
    for at, arm in enumerate([*arms, never]):
        ended = _is_done(work, out) or in_a_child(partial(work.run, out, at > 0), arm)
        kills += not ended
        if not work.name.startswith("train") and out.exists() and not contents(out).items() >= work.whole.items():
            return kills, "something half-written stands at the output"
        if ended:
            break
    if contents(out) != work.whole:
        return kills, "other bytes than those of an undisturbed one"
    beside = [path.name for path in out.parent.iterdir() if path.name != out.name]
    return kills, f"left beside it: {beside}" if beside else ""


def _is_done(work: Work, out: Path) -> bool:
    """A merge that was killed after the last thing it does: there is nothing to resume."""
    return not work.name.startswith("train") and out.exists() and contents(out) == work.whole


def campaign(works: list[Work], folder: Path, wanted: int, seed: int) -> tuple[int, list[str]]:
    """Kill until so many kills were in time: how many, and what went wrong."""
    chance, kills, wrong = random.Random(seed), 0, list[str]()
    took = {}
    for work in works:
        began = time.monotonic()
        in_a_child(partial(work.run, folder / "timed" / work.name, False), never)
        took[work.name] = time.monotonic() - began
    for at in count():
        if kills >= wanted or at > 4 * wanted:
            return kills, wrong
        work, out = works[at % len(works)], folder / f"{at}" / "out"
        out.parent.mkdir()
        first = before_call(at // 2) if at % 2 and kills < wanted / 2 else after(chance.uniform(0, took[work.name]))
        again = [before_call(chance.randrange(60))] if chance.random() < 0.5 else []
        came, problem = kill_and_resume(work, out, [first, *again])
        kills += came
        if problem:
            wrong.append(f"{work.name}, number {at}: {problem}")
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--merges", type=int, default=160, help="kills of merges")
    parser.add_argument("--runs", type=int, default=40, help="kills of training runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong: list[str] = []
    for what, make, wanted in (("merges", merges, options.merges), ("runs", runs, options.runs)):
        with tempfile.TemporaryDirectory(prefix="kills_") as name:
            began = time.monotonic()
            works = list(make(Path(name))) if wanted else []
            kills, found = campaign(works, Path(name), wanted, options.seed) if works else (0, [])
            print(f"{what}: {kills} kills of {len(works)}, {len(found)} wrong, {time.monotonic() - began:.0f} s")
            wrong += found
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
