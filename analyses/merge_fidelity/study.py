"""What does merging a trained adapter change, and how much faster does the merged model run? Of four_kinds' cells.

python analyses/merge_fidelity/study.py --base DIR --data DIR --cells DIR [--items N] [--seeds N] [--jobs N]
python analyses/merge_fidelity/study.py --tiny
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

import torch

import d2surgery

sys.path.insert(0, str(Path(__file__).parents[1]))
from cells import cells_in, lacking, options_of, said_of_lacking, some_of_each, tiny_cells
from four_kinds.study import SEED, SETS, asked
from studying import machine, sha256, versions, write

HERE = Path(__file__).resolve().parent
QUESTION = "What does merging a trained adapter change, and how much faster does the merged model run?"
DTYPES = {"fp32": "F32", "bf16": "BF16"}
ITEMS, PROMPTS, ROUNDS = 20, 8, 7  # of each task; whose logits are compared; of each measurement of speed
SHAPES = {"8 rows of 64 tokens": (8, 64), "a token at a time": (1, 1)}
CORE = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = options_of(QUESTION)
    parser.add_argument("--base", type=Path, help="that the cells were trained on")
    parser.add_argument("--data", type=Path, help="where NAME-test.json.gz lies (LLM-Adapters' commonsense sets)")
    parser.add_argument("--items", type=int, default=ITEMS, help="of each task")
    parser.add_argument("--seeds", type=int, default=1, help="of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, of one thread each; speed comes after")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(of_cell(**options.one)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.tiny:
            options.items, options.data = 4, work
            options.base, options.cells = tiny_cells(work, ("LoRA r16", "D2-LoRA 8+8"), 1)
        if not (options.base and options.data and options.cells):
            parser.error("--base, --data and --cells, or --tiny")
        results = study(options, work)
    write(results, options.results or HERE)
    print(table(results))


def study(options: Any, work: Path) -> dict[str, Any]:
    """The whole of results.json."""
    cells = some_of_each(cells_in(options.cells), options.base.name, options.seeds)
    tasks = [write_task(options.data / f"{name}-test.json.gz", work / f"{name}.json") for name in SETS["small"]]
    given = {"base": str(options.base), "tasks": [str(task) for task in tasks], "items": options.items}
    run = (lambda one: of_cell(**one)) if options.tiny else in_its_own_process
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda cell: run(given | {"adapter": cell["folder"]}), cells))
    rows = []
    for cell, one in zip(cells, found, strict=True):
        about = {name: cell[name] for name in ("arm", "seed", "lr")}
        rows.append(about | one | {"speed": speed(options.base, cell["folder"], work)})
    weights = [Path(cell["folder"]) / "adapter_model.safetensors" for cell in cells]
    return {
        "question": QUESTION,
        "machine": machine(threads=1),
        "versions": versions("transformers"),
        "seed": SEED,
        "inputs_sha256": {file.parent.name: sha256(file) for file in weights},
        "items": options.items,
        "lacking": lacking(cells, options.seeds),
        "rows": rows,
    }


def write_task(source: Path, to: Path) -> Path:
    """Questions with the texts of their choices."""
    to.write_text(json.dumps([item for item in asked(source) if item["answer"] in item["choices"]]))
    return to


def in_its_own_process(one: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "study.py"), "--one", json.dumps(one)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=CORE)
    if done.returncode:
        raise RuntimeError(f"{one['adapter']} failed:\n{done.stderr}")
    print(one["adapter"], file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# One cell -------------------------------------------------------------------------------------------------------------


def of_cell(base: str, adapter: str, tasks: list[str], items: int) -> dict[str, Any]:
    """Per dtype of the merged model: what is left of the delta, logits, answers."""
    questions = [json.loads(Path(task).read_text()) for task in tasks]
    prompts = [item["question"] for several in questions for item in several[: PROMPTS // len(tasks)]]
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        plan = d2surgery.plan(base, adapter, Path(work) / "none", dtypes=tuple(DTYPES.values()))
        unmerged = answers(Path(work) / "unmerged", tasks, items, base=base, adapter=adapter)
        for dtype in DTYPES:
            merged = Path(work) / dtype
            d2surgery.merge(base, adapter, merged, dtype=dtype)
            found = answers(Path(work) / f"{dtype}.jsonl", tasks, items, base=base, merged=merged)
            kept = reduce(add, (by[DTYPES[dtype]] for by in plan.survival.values()))
            logits = d2surgery.compare_outputs(base, adapter, merged, prompts=prompts).logits
            names = ("positions", "kl_mean", "kl_max", "top1_agreement", "max_abs", "noise_floor",
                     "noise_top1_agreement", "rounding_floor", "effect", "strength")  # fmt: skip
            said[dtype] = {
                "gain": kept.gain, "lost": kept.relative_error,
                "logits": {name: getattr(logits, name) for name in names},
                "answers": against(unmerged, found),
            }  # fmt: skip
    return said


def answers(file: Path, tasks: list[str], items: int, **models: object) -> list[dict[str, Any]]:
    """What `d2surgery eval` says of each item: the choice whose text is likeliest, computed in float32."""
    command = [sys.executable, "-m", "d2surgery", "eval", "--quiet", "--dtype", "fp32"]
    command += ["--limit", str(items), "--items", str(file)]
    command += [word for name, path in models.items() for word in (f"--{name}", str(path))]
    command += [word for task in tasks for word in ("--tasks", task)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=CORE)
    return [json.loads(line) for line in file.read_text().splitlines()]


def against(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Flips, and how many are expected: with margins m of the chosen text and changes of them of size s, mean Φ(−m/s).

    The expectation needs no flip to be seen, so that few items say more by it than by counting.
    """
    pairs = list(zip(before, after, strict=True))
    margins, changes = [], []
    for old, new in pairs:
        was, now = old["log_likelihoods"], new["log_likelihoods"]
        first, second = sorted(range(len(was)), key=was.__getitem__, reverse=True)[:2]
        margins.append(was[first] - was[second])
        changes.append(now[first] - now[second] - margins[-1])
    size = mean(change**2 for change in changes) ** 0.5
    tasks = dict.fromkeys(old["task"] for old in before)
    return {
        "items": len(pairs),
        "right_before": sum(old["picked"] == old["gold"] for old in before),
        "right_after": sum(new["picked"] == new["gold"] for new in after),
        "flips": sum(old["picked"] != new["picked"] for old, new in pairs),
        "flips_expected": mean(NormalDist().cdf(-margin / size) for margin in margins) * len(pairs) if size else 0.0,
        "margin_change": size,
        "gaps_pp": {task: gap_pp([pair for pair in pairs if pair[0]["task"] == task]) for task in tasks},
    }


def gap_pp(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Accuracy merged − unmerged in percentage points."""
    changes = [int(new["picked"] == new["gold"]) - int(old["picked"] == old["gold"]) for old, new in pairs]
    return 100 * mean(changes)


# Speed ----------------------------------------------------------------------------------------------------------------


def speed(base: Path, adapter: str, work: Path) -> dict[str, list[float]]:
    """Shape -> merged over unmerged tokens per CPU second, float32: a ratio of neighbours for each round."""
    from transformers import AutoModelForCausalLM

    merged = work / "merged"
    d2surgery.merge(base, adapter, merged, dtype="fp32")
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (merged, base)]
    d2surgery.attach(models[1], d2surgery.load(adapter), trainable=False)
    for file in merged.iterdir():
        file.unlink()
    merged.rmdir()
    ratios = {}
    for name, shape in SHAPES.items():
        ids = torch.randint(models[0].config.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))
        runs = [lambda model=model, ids=ids: forward(model.eval(), ids) for model in models]
        ratios[name] = [round(second / first, 4) for first, second in (rounds(runs) for _ in range(ROUNDS + 1))][1:]
    return ratios


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> None:
    """A single token has 16 before it in the cache; of many rows the last logits are computed."""
    if ids.shape[1] > 1:
        model(input_ids=ids, logits_to_keep=1)
        return
    cache = model(input_ids=ids.expand(1, 16), use_cache=True).past_key_values
    for _ in range(8):
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def rounds(runs: Sequence[Callable[[], None]]) -> list[float]:
    """CPU seconds of each, one after the other."""
    seconds = []
    for run in runs:
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return seconds


# What is said ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    rows = results["rows"]
    if not rows:
        return "**Not run.** No number stands here yet."
    heads = ["arm", "merged in", "kept of the delta", "error, of the delta", "KL, nats", "of a right merge",
             "of serving unmerged", "of the adapter", "answers right, unmerged → merged",
             "flips (95 %)", "flips expected"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        for dtype in DTYPES:
            one, logits, said = row[dtype], row[dtype]["logits"], row[dtype]["answers"]
            cells = [
                row["arm"], dtype, f"{one['gain']:.4f}", f"{one['lost']:.2g}",
                *(f"{logits[name]:.2g}" for name in ("kl_mean", "rounding_floor", "noise_floor", "effect")),
                f"{said['right_before']} → {said['right_after']} of {said['items']}",
                flips(said["flips"], said["items"]), f"{said['flips_expected']:.2g}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += [""]
    for dtype in DTYPES:
        gaps = [gap for row in rows for gap in row[dtype]["answers"]["gaps_pp"].values()]
        said = [row[dtype]["answers"] for row in rows]
        every, flipped = (sum(one[name] for one in said) for name in ("items", "flips"))
        share = 100 * sum(one["flips_expected"] for one in said) / every
        worst = f"at worst {max(gaps, key=abs):+.2f} in a task of an arm"
        seen = f"{flips(flipped, every)} flips of {every} answers, {share:.2g} % expected"
        lines.append(f"- {dtype}: gap {mean(gaps):+.2f} points on average, {worst}; {seen}.")
    lines += ["", "| arm | " + " | ".join(f"merged / unmerged, {name}" for name in SHAPES) + " |",
              "|---" * (1 + len(SHAPES)) + "|"]  # fmt: skip
    for row in rows:
        spans = [f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in row["speed"].values()]
        lines.append(f"| {' | '.join([row['arm'], *spans])} |")
    return "\n".join(lines + said_of_lacking(results["lacking"]))


def flips(count: int, items: int) -> str:
    """With Wilson's interval of the share."""
    from scipy.stats import binomtest

    found = binomtest(count, items).proportion_ci(method="wilson")
    return f"{count} ({100 * found.low:.1f} to {100 * found.high:.1f} %)"


if __name__ == "__main__":
    main()
