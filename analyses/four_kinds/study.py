"""Do D2-LoRA, Dual LoRA and DoRA learn free-form answers better, or more steadily, than LoRA of equal parameters?

Each arm's learning rate is chosen on a seed and on items of its own; fresh seeds are paired by rows. A cell is one
training in a process of its own and stays when it is done: the same command goes on where it was stopped.

    python analyses/four_kinds/study.py --base MODEL --data DIR --work DIR [--jobs N] [--device cuda] [--budget paper]
    python analyses/four_kinds/study.py --tiny [--ablations]
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, sha256, versions, write

HERE = Path(__file__).resolve().parent
SEED, CHOOSING, CONTROL = 0, 100, "LoRA r16, alpha doubled"
ARMS: dict[
    str, dict[str, Any]
] = {  # D2-LoRA and Dual LoRA: half of `rank` in each group; the scaling is alpha/r of one
    "LoRA r16": {"kind": "lora", "rank": 16, "alpha": 32.0},
    CONTROL: {"kind": "lora", "rank": 16, "alpha": 64.0},
    "LoRA r32": {"kind": "lora", "rank": 32, "alpha": 64.0},
    "DoRA r16": {"kind": "dora", "rank": 16, "alpha": 32.0},
    "D2-LoRA 8+8": {"kind": "d2lora", "rank": 16, "alpha": 16.0},
    "D2-LoRA 16+16": {"kind": "d2lora", "rank": 32, "alpha": 32.0},
    "Dual LoRA 8+8": {"kind": "duallora", "rank": 16, "alpha": 16.0},
}
ABLATIONS: dict[str, dict[str, Any]] = {  # of D2-LoRA 8+8, and its scaling at which Ŵ ≈ W0 + 2ΔW weighs as LoRA's
    "D2-LoRA 8+8, alpha halved": ARMS["D2-LoRA 8+8"] | {"alpha": 8.0},
    "D2-LoRA 8+8, minus off": ARMS["D2-LoRA 8+8"] | {"tau": 0.0},
    "D2-LoRA 8+8, minus detached": ARMS["D2-LoRA 8+8"] | {"detach_minus": True},
    "D2-LoRA 8+8, norm detached": ARMS["D2-LoRA 8+8"] | {"detach_norm": True},
}
SETS = {"small": ("openbookqa", "ARC-Easy"), "paper": ("boolq", "piqa", "social_i_qa", "winogrande", "ARC-Easy",
        "ARC-Challenge", "openbookqa", "hellaswag")}  # fmt: skip
BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"lrs": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3), "seeds": 4, "held_out": 200, "batch": 16, "window": 8,
              "length": {"steps": 48, "limit": 5000}},
    "paper": {"lrs": (1e-4, 2e-4, 5e-4), "seeds": 4, "held_out": 1000, "batch": 16, "window": 20,
              "length": {"epochs": 2.0, "limit": 5000}},
    "tiny": {"lrs": (1e-3, 1e-2), "seeds": 2, "held_out": 4, "batch": 2, "window": 2,
             "length": {"steps": 6, "limit": 50}},
}  # fmt: skip
TINY_ARMS = ("LoRA r16", CONTROL, "D2-LoRA 8+8")
POWER = 2.8  # of standard errors: what 80 % of repetitions find at 5 %, two-sided, for many seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", help="a model directory; several with --budget paper")
    parser.add_argument("--data", type=Path, help="where NAME-train.json.gz and NAME-test.json.gz lie")
    parser.add_argument("--work", type=Path, help="where the cells go, and stay")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each with one thread on a CPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", default="small", choices=("small", "paper"))
    parser.add_argument(
        "--ablations", action="store_true", help="what of D2-LoRA it is: other arms, --results elsewhere"
    )
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--tiny", action="store_true", help="a random model, six steps; the numbers mean nothing")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        run_cell(options.cell)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.work = Path(scratch)
            options.base, options.data, options.budget = [str(tiny_base(options.work))], tiny_data(options.work), "tiny"
        if not (options.base and options.data and options.work):
            parser.error("--base, --data and --work, or --tiny")
        results = study(options)
    write(results, options.results)
    print(table(results))


def study(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of results.json."""
    budget, work = BUDGETS[options.budget], options.work
    files = write_data(options.data, work, SETS.get(options.budget, SETS["small"]), budget["held_out"])
    run = run_cell if options.tiny else in_its_own_process
    arms = TINY_ARMS if options.tiny or options.ablations else tuple(ARMS)
    arms += tuple(ABLATIONS) if options.ablations else ()
    chosen, found = [], []
    for base in options.base:
        common = {"base": base, "files": files, "budget": options.budget, "device": options.device, "work": str(work)}
        searches = [partial(search, run, common | {"arm": arm, "seed": CHOOSING}, budget["lrs"]) for arm in arms]
        tried = in_threads(searches, options.jobs)
        rates = {
            arm: min(trials, key=lambda trial: trial["loss"])["lr"] for arm, trials in zip(arms, tried, strict=True)
        }
        chosen += [trial for trials in tried for trial in trials]
        fresh = [common | {"arm": a, "lr": rates[a], "seed": seed} for seed in range(budget["seeds"]) for a in arms]
        found += in_threads([partial(run, cell) for cell in fresh], options.jobs)
    return {
        "question": "Do the kinds learn free-form answers better, or more steadily, than LoRA of equal parameters?",
        "budget": options.budget,
        "machine": machine(device=options.device),
        "versions": versions("transformers"),
        "seed": SEED,
        "inputs_sha256": {Path(file).name: sha256(Path(file)) for file in files.values()},
        "learning_rates_tried": chosen,
        "cells": found,
        "arms": [judged(found, base, arm) for base in dict.fromkeys(r["base"] for r in found) for arm in arms],
    }  # fmt: skip


# Cells ----------------------------------------------------------------------------------------------------------------


def in_threads(work: Sequence[Callable[[], Any]], jobs: int) -> list[Any]:
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(lambda one: one(), work))


def search(
    run: Callable[[dict[str, Any]], dict[str, Any]], cell: dict[str, Any], rates: tuple[float, ...]
) -> list[dict[str, Any]]:
    """The cells tried: from the middle rate to the neighbour with a lower loss, until neither neighbour has one."""
    tried: dict[int, dict[str, Any]] = {}

    def loss(at: int) -> float:
        if at not in tried:
            tried[at] = run(cell | {"lr": rates[at]})
        return float(tried[at]["loss"])

    at, before = len(rates) // 2, -1
    while at != before:
        near = [near for near in (at, at - 1, at + 1) if 0 <= near < len(rates)]
        at, before = min(near, key=loss), at
    return [tried[at] for at in sorted(tried)]


def in_its_own_process(cell: dict[str, Any]) -> dict[str, Any]:
    if record(cell).exists():
        return run_cell(cell)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{cell['arm']}, seed {cell['seed']} failed:\n{done.stderr}")
    print(f"{cell['arm']:24} lr {cell['lr']:g} seed {cell['seed']}", file=sys.stderr)
    return run_cell(cell)


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Its record, made now if there is none: held-out nats per token, and the loss of every step."""
    from d2surgery import read_config, train

    if record(cell).exists():
        stored: dict[str, Any] = json.loads(record(cell).read_text())
        return stored
    budget, out = BUDGETS[cell["budget"]], record(cell).parent
    config = read_config(None, {
        "base": cell["base"], "output": str(out), **(ARMS | ABLATIONS)[cell["arm"]], "train": [cell["files"]["train"]],
        "held_out": [cell["files"]["choosing" if cell["seed"] == CHOOSING else "held_out"]],
        "held_out_limit": budget["held_out"], "max_length": 256, "batch": budget["batch"], "lr": cell["lr"],
        **budget["length"], "seed": cell["seed"], "device": "cpu" if cell["device"] == "cpu" else "auto",
        "precision": "fp32" if cell["device"] == "cpu" else "bf16", "log_every": 1, "keep": 1,
    })  # fmt: skip
    report = train(config, resume=True)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    made = {name: cell[name] for name in ("arm", "lr", "seed")} | {
        "base": Path(cell["base"]).name, "loss": report.last_eval_loss, "start": report.first_eval_loss,
        "volatility": volatility(losses, budget["window"]), "parameters": report.trainable_parameters,
        "steps": report.steps, "seconds_per_step": report.seconds_per_step, "losses": losses,
    }  # fmt: skip
    record(cell).write_text(json.dumps(made))
    return made


def record(cell: dict[str, Any]) -> Path:
    name = re.sub(r"\W+", "-", f"{Path(cell['base']).name} {cell['arm']} {cell['lr']:g} {cell['seed']}")
    return Path(str(cell["work"]), cell["budget"], name, "record.json")


def volatility(losses: list[float], window: int) -> float:
    """The mean, over the second half of the steps, of the standard deviation of the loss in a window."""
    late = losses[len(losses) // 2 :]
    windows = [late[at : at + window] for at in range(len(late) - window + 1)] or [losses]
    return mean(stdev(part) for part in windows)


# What is said ---------------------------------------------------------------------------------------------------------


def judged(cells: list[dict[str, Any]], base: str, arm: str) -> dict[str, Any]:
    """An arm against the control and against LoRA r16, seed by seed: the same rows in the same order."""
    mine = {cell["seed"]: cell for cell in cells if (cell["base"], cell["arm"]) == (base, arm)}
    said: dict[str, Any] = {"base": base, "arm": arm, "lr": next(iter(mine.values()))["lr"],
                            "parameters": next(iter(mine.values()))["parameters"],
                            "loss": interval([cell["loss"] for cell in mine.values()])}  # fmt: skip
    for over in (CONTROL, "LoRA r16"):
        theirs = {cell["seed"]: cell for cell in cells if (cell["base"], cell["arm"]) == (base, over)}
        pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine)]
        said[f"loss − {over}"] = interval([a["loss"] - b["loss"] for a, b in pairs])
        said[f"volatility / {over}"] = interval([a["volatility"] / b["volatility"] for a, b in pairs])
    return said


def interval(values: list[float]) -> dict[str, float]:
    """Mean, Student's 95 % interval, and the smallest difference that these seeds would have found with 80 % power."""
    from scipy.stats import t

    error = stdev(values) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half, "found": POWER * error}


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    if not results["arms"]:
        return "**Not run.** No number stands here yet."
    lines = ["| base | arm | parameters | learning rate | held-out nats per token | − doubled alpha | − LoRA r16 "
             "| volatility / LoRA r16 |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in results["arms"]:
        cells = [
            one["base"], one["arm"], one["parameters"], f"{one['lr']:g}", said(one["loss"]),
            said(one[f"loss − {CONTROL}"], "+"), said(one["loss − LoRA r16"], "+"),
            said(one["volatility / LoRA r16"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    found = max(one["loss − LoRA r16"]["found"] for one in results["arms"])
    lines += ["", f"With these seeds a difference of {found:.3f} nats would be found with 80 % power."]
    return "\n".join(lines)


def said(one: dict[str, float], sign: str = "") -> str:
    return f"{one['mean']:{sign}.3f} ({one['low']:{sign}.3f} to {one['high']:{sign}.3f})"


# Data -----------------------------------------------------------------------------------------------------------------


def write_data(data: Path, work: Path, names: tuple[str, ...], held_out: int) -> dict[str, str]:
    """Questions with the text of the right answer: train; and of the test sets two parts, to choose a rate by and to
    judge by, which share no item."""
    work.mkdir(parents=True, exist_ok=True)
    missing = [str(data / f"{n}-{part}.json.gz") for n in names for part in ("train", "test")
               if not (data / f"{n}-{part}.json.gz").exists()]  # fmt: skip
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)} (LLM-Adapters' commonsense sets)")
    train = [item for name in names for item in rewritten(data / f"{name}-train.json.gz")]
    each = 2 * held_out // len(names)
    test = [item for name in names for item in list(rewritten(data / f"{name}-test.json.gz"))[:each]]
    parts = {"train": train, "choosing": test[::2], "held_out": test[1::2]}
    files = {part: work / f"{part}.json" for part in parts}
    for part, file in files.items():
        file.write_text(json.dumps(parts[part]))
    return {part: str(file) for part, file in files.items()}


def asked(path: Path) -> Iterator[dict[str, Any]]:
    """`question\\n\\nAnswer1: … Answer2: …` with its label, as question, choices and the words of the answer."""
    for item in json.loads(gzip.decompress(path.read_bytes())):
        text = item["instruction"]
        question = re.split(r"\n\n", text)[0].partition(": ")[2] or text
        choices = re.split(r"(?:Answer|Solution|Option|Ending)\d+: ", text.partition("\n\n")[2].partition("\n\n")[0])[
            1:
        ]
        number = re.search(r"(\d+)$", item["answer"])
        answer = choices[int(number[1]) - 1].strip() if number and choices else item["answer"]
        if question.strip() and answer:
            yield {"question": question.strip(), "choices": [choice.strip() for choice in choices], "answer": answer}


def rewritten(path: Path) -> Iterator[dict[str, str]]:
    """The question alone, and the words of the answer."""
    return ({"question": item["question"], "answer": item["answer"]} for item in asked(path))


def tiny_data(work: Path) -> Path:
    choices = "Answer1: red Answer2: blue"
    for part, count in (("train", 24), ("test", 16)):
        for name in SETS["small"]:
            asked = f"Please choose the correct answer to the question: {name} {part}"
            items = [{"instruction": f"{asked} {n}?\n\n{choices}\n\nAnswer format: answer1/answer2", "input": "",
                      "output": f"the correct answer is answer{1 + n % 2}", "answer": f"answer{1 + n % 2}"}
                     for n in range(count)]  # fmt: skip
            (work / f"{name}-{part}.json.gz").write_bytes(gzip.compress(json.dumps(items).encode(), mtime=0))
    return work


def tiny_base(work: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(["</s>", "<unk>", "red", "blue", "?", *map(str, range(24)), *"ab"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **sizes))
    model.save_pretrained(work / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(work / "base")
    return work / "base"


if __name__ == "__main__":
    main()
