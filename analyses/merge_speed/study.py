"""How long and how much memory does merging take, against PEFT and `cp`?

Every measurement is one process from start to exit, imports included: wall clock and the kernel's peak resident
memory. This process stays small and imports neither torch nor d2surgery: a child's peak counts its parent's pages.

    python analyses/merge_speed/study.py --work DIR [--rounds N] [--tiny]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, process, python, versions, write

HERE = Path(__file__).resolve().parent
SEED, RANK, ROUNDS = 0, 16, 5
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256, "num_hidden_layers": 16} | HEADS
OTHER_DEPTHS = (8, 32)  # peak memory only
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "num_hidden_layers": 2} | TINY_HEADS
TINY_OTHER_DEPTHS = (1,)
BAR = 1 / 1024  # share of bfloat16 elements that may differ

OURS = str(Path(sys.executable).with_name("d2surgery"))
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
COMPARE = """
import json, sys
from d2surgery import BaseWeights
ours, peft = map(BaseWeights, sys.argv[1:3])
names = [name for name in ours if "_proj." in name and (".0." in name or f".{sys.argv[3]}." in name)]
differing = sum(int((ours[name] != peft[name]).sum()) for name in names)
print(json.dumps({"tensors": len(names), "elements": sum(ours[n].numel() for n in names), "differing": differing}))
"""
# Name -> command: a program, the adapter, options. In this order in each round; a d2surgery run right after PEFT's.
RUNS = {
    "cp": ("cp", ""),
    "PEFT LoRA": (PEFT, "lora"),
    "d2surgery LoRA": (OURS, "lora", "--verify"),
    "d2surgery LoRA, no hashes, no fsync": (OURS, "lora", "--no-verify"),
    "PEFT DoRA": (PEFT, "dora"),
    "d2surgery DoRA": (OURS, "dora", "--verify"),
    "d2surgery D2-LoRA": (OURS, "d2lora", "--verify"),
    "d2surgery Dual LoRA": (OURS, "duallora", "--verify"),
}
RATIOS = [  # slow, fast, the target
    ("PEFT LoRA", "d2surgery LoRA", 3),
    ("PEFT LoRA", "d2surgery LoRA, no hashes, no fsync", 4),
    ("PEFT DoRA", "d2surgery DoRA", 4),
    ("PEFT DoRA", "d2surgery D2-LoRA", 4),
    ("PEFT DoRA", "d2surgery Dual LoRA", None),
    ("d2surgery LoRA", "cp", None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where the inputs and outputs lie (25 GB); default: a temporary one")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json and the figure go")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="merge_speed_") as name:
        work = Path(name).resolve()
        if options.tiny:
            results = study(work, TINY, TINY_OTHER_DEPTHS, rounds=1)
        else:
            results = study(work, SHAPE, OTHER_DEPTHS, options.rounds)
    write(results, options.results)
    python(HERE / "figure.py", options.results)
    print(table(results))


def study(work: Path, shape: dict[str, int], other_depths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """The whole of results.json."""
    depth = shape["num_hidden_layers"]
    hashes = {f"{layers} layers": build(work / str(layers), shape, layers) for layers in (depth, *other_depths)}
    runs, agreement = [], []
    for number in range(rounds):
        for name in RUNS:
            runs.append({"round": number, "layers": depth, "run": name} | measure(work / str(depth), name))
        for name in ("d2surgery LoRA", "d2surgery DoRA"):  # at the end: gigabytes are read and removed
            found = compare(work / str(depth), name, depth)
            agreement.append({"round": number, "run": name} | found)
            assert found["differing"] <= BAR * found["elements"], f"{name} is not PEFT's merge: {found}"
    for layers in other_depths:
        for name in RUNS:
            every = shape is not TINY or name == "d2surgery LoRA"
            if every and "--verify" in RUNS[name]:
                runs.append({"round": 0, "layers": layers, "run": name} | measure(work / str(layers), name))
    return {
        "question": "How long and how much memory does merging take, against PEFT and cp?",
        "machine": machine(),
        "versions": versions("transformers", "peft", "safetensors"),
        "seed": SEED,
        "rank": RANK,
        "shape": shape,
        "inputs_sha256": hashes,
        "rounds": rounds,
        "runs": runs,
        "ratios": [ratio(runs, depth, *pair) for pair in RATIOS],
        "agreement_with_peft": agreement,
    }


def build(directory: Path, shape: dict[str, int], layers: int) -> dict[str, str]:
    """Base and adapters, by another process; their sha256."""
    described = json.dumps(shape | {"num_hidden_layers": layers})
    written = python(HERE / "inputs.py", directory, "--shape", described, "--rank", RANK, "--seed", SEED)
    hashes: dict[str, str] = json.loads(written)
    return hashes


def measure(inputs: Path, name: str) -> dict[str, float]:
    """Of one whole process. PEFT's output stays until ours is compared with it."""
    program, adapter, *options = RUNS[name]
    out = inputs / name
    shutil.rmtree(out, ignore_errors=True)
    base, adapter, made = str(inputs / "base"), str(inputs / adapter), str(out)
    if program == "cp":
        command = ["cp", "-r", base, made]
    elif program == OURS:
        named = ["--base", base, "--adapter", adapter, "--out", made]
        command = [OURS, "merge", *named, "--quiet", *options]
    else:
        command = [sys.executable, "-Pc", program, base, adapter, made]
    os.sync()
    kept = os.environ | {"XDG_CACHE_HOME": str(inputs / "cache")}  # hashes, apart from the user's own
    try:
        found = process(command, env=kept)
    except RuntimeError as error:
        raise RuntimeError(f"{name} failed: {error}") from None
    if not name.startswith("PEFT") and name not in ("d2surgery LoRA", "d2surgery DoRA"):
        shutil.rmtree(out)
    print(
        f"{inputs.name:>3} layers  {name:36} {found['seconds']:7.2f} s {found['peak_bytes'] / 1e6:8.0f} MB",
        file=sys.stderr,
    )
    return found


def compare(inputs: Path, name: str, depth: int) -> dict[str, int]:
    """Elements of the first and last layer that differ from PEFT's merge. Removes both outputs."""
    ours, theirs = inputs / name, inputs / name.replace("d2surgery", "PEFT")
    found: dict[str, int] = json.loads(python("-c", COMPARE, ours, theirs, depth - 1))
    shutil.rmtree(ours)
    shutil.rmtree(theirs)
    return found


def ratio(runs: list[dict[str, Any]], depth: int, slow: str, fast: str, target: int | None) -> dict[str, Any]:
    """Of the two runs of each round."""
    seconds = {(run["run"], run["round"]): run["seconds"] for run in runs if run["layers"] == depth}
    each = [seconds[slow, number] / seconds[fast, number] for name, number in seconds if name == slow]
    values = {"median": median(each), "min": min(each), "max": max(each)}
    return {"slow": slow, "fast": fast, "target": target} | {key: round(value, 2) for key, value in values.items()}


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    depth = results["shape"]["num_hidden_layers"]
    lines = ["| run | seconds: median (min to max) | CPU seconds | peak memory, MB |", "|---|---|---|---|"]
    for name in RUNS:
        mine = [run for run in results["runs"] if run["run"] == name and run["layers"] == depth]
        times = [run["seconds"] for run in mine]
        cpu = median(run["cpu_seconds"] for run in mine)
        peak = max(run["peak_bytes"] for run in mine) / 1e6
        wall = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        lines.append(f"| {name} | {wall} | {cpu:.1f} | {peak:.0f} |")
    lines += ["", "| times as fast, of paired runs | median (min to max) | target |", "|---|---|---|"]
    for one in results["ratios"]:
        numbers = f"{one['median']:.1f} ({one['min']:.1f} to {one['max']:.1f})"
        lines.append(f"| {one['fast']} against {one['slow']} | {numbers} | {one['target'] or ''} |")
    depths = sorted({run["layers"] for run in results["runs"]})
    lines += [
        "",
        f"| peak memory in MB | {' | '.join(f'{n} layers' for n in depths)} |",
        "|---|" + "---|" * len(depths),
    ]
    for name in dict.fromkeys(run["run"] for run in results["runs"] if run["layers"] != depth):
        peaks = [max(r["peak_bytes"] for r in results["runs"] if r["run"] == name and r["layers"] == n) for n in depths]
        lines.append(f"| {name} | {' | '.join(f'{peak / 1e6:.0f}' for peak in peaks)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
