"""The long fuzz: `python tests/fuzz/run.py [--inputs 20000] [--jobs 2] [--seed 0] [--only TARGET]`.

Every input is decided by its seed, so that `--seed N --inputs 1` gives one again, with its traceback. Counted are
foreign exceptions, inputs of over 2 s of CPU, growth of memory beyond 300 MB, silent drops, processes that died; all
must be 0. Where atheris is installed, `--atheris SECONDS` also follows the coverage of the readers of bytes.
"""

import argparse
import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS, MEGABYTES, WAIT = 2.0, 300, 20
KINDS = ("foreign", "slow", "large", "dropped", "died")


def peak(reset: bool = False) -> int:
    """The most memory of this process in MB, since the last reset."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def work(first: int, count: int, step: int, only: str | None) -> None:
    """Inputs first, first + step, …; a line of JSON for each finding and one at the end."""
    import faulthandler

    from targets import Dropped, one
    from world import build

    warnings.simplefilter("ignore")
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder) / "world")
        for seed in range(first, first + count * step, step):
            print(json.dumps({"at": seed}), flush=True)
            faulthandler.dump_traceback_later(WAIT, exit=True)
            before, began = peak(reset=True), time.process_time()
            name, error = one(world, seed, only)
            seconds, grown = time.process_time() - began, peak() - before
            tally[name] += 1
            found = {
                "foreign": error is not None and not isinstance(error, Dropped),
                "dropped": isinstance(error, Dropped),
                "slow": seconds > SECONDS,
                "large": grown > MEGABYTES,
            }
            for kind in (kind for kind, is_so in found.items() if is_so):
                said = (
                    "".join(traceback.format_exception(error)[-6:])[-2000:] if error else f"{seconds:.1f} s, {grown} MB"
                )
                print(json.dumps({"kind": kind, "seed": seed, "target": name, "said": said}), flush=True)
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"done": tally}), flush=True)


def follow(command: list[str], environment: dict[str, str]) -> tuple["collections.Counter[str]", list[dict[str, str]]]:
    """What a worker tells: how many inputs of each target, and its findings; that it died is one."""
    tally: collections.Counter[str] = collections.Counter()
    findings: list[dict[str, str]] = []
    at, done = "?", False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            said = json.loads(line)
            at, done = said.get("at", at), done or "done" in said
            tally.update(said.get("done", {}))
            findings += [said] if "kind" in said else []
    if not done:
        findings.append({"kind": "died", "seed": at, "target": "?", "said": f"exit {process.returncode}"})
    return tally, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--atheris", type=int, metavar="SECONDS")
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        first, count, step = chosen.worker
        work(first, count, step, chosen.only)
        return 0
    if chosen.atheris:
        from coverage_guided import run

        run(chosen.atheris)
        return 0
    began = time.monotonic()
    tally: collections.Counter[str] = collections.Counter()
    findings: list[dict[str, str]] = []
    jobs = min(chosen.jobs, chosen.inputs)
    search = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    command = [sys.executable, str(Path(__file__)), *(["--only", chosen.only] if chosen.only else []), "--worker"]
    with ThreadPoolExecutor(jobs) as pool:
        parts = [
            [*command, str(chosen.seed + job), str(len(range(job, chosen.inputs, jobs))), str(jobs)]
            for job in range(jobs)
        ]
        for part, told in pool.map(lambda part: follow(part, environment), parts):
            tally += part
            findings += told
    for found in findings:
        print(f"{found['kind']} seed {found['seed']} {found['target']}\n{found['said']}\n")
    counts = collections.Counter(str(found["kind"]) for found in findings)
    print(", ".join(f"{name} {number}" for name, number in sorted(tally.items())))
    print(
        f"{sum(tally.values())} inputs in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{k} {counts[k]}" for k in KINDS)
    )
    return int(bool(findings) or sum(tally.values()) < chosen.inputs)


if __name__ == "__main__":
    raise SystemExit(main())
