"""How long and how much memory do `diff` and `report` take on adapters of an 8-billion-parameter model?

Every run is one process from start to exit, imports included: wall clock, CPU seconds of all threads and the kernel's
peak resident memory. This process imports neither torch nor d2surgery.

    python analyses/report_speed/study.py --work DIR [--before CHECKOUT] [--rounds N] [--tiny]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, process, python, sha256, versions, write

HERE = Path(__file__).resolve().parent
SEED, ROUNDS, RANK, MANY = 0, 3, 16, 10
LARGE = {"hidden": 4096, "inner": 14336, "key": 1024, "layers": 32}  # an 8B model's adapter; there is no base
ONE = LARGE | {"layers": 1}  # what can be compared by the way before in reasonable time
TINY = {"hidden": 64, "inner": 128, "key": 32, "layers": 1}
TARGETS = {"diff, 2 adapters": (6.0, 450e6), "diff, 10 adapters": (60.0, 450e6)}

WRITE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
out, shape, rank, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
numbers = torch.Generator().manual_seed(seed)
h, i, k = shape["hidden"], shape["inner"], shape["key"]
linear = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (k, h), "self_attn.v_proj": (k, h),
          "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
adapter = {}
for layer in range(shape["layers"]):
    for name, (rows, columns) in linear.items():
        key = f"base_model.model.model.layers.{layer}.{name}"
        adapter[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=numbers).bfloat16()
        adapter[f"{key}.lora_B.weight"] = (0.01 * torch.randn(rows, rank, generator=numbers)).bfloat16()
out.mkdir(parents=True)
save_file(adapter, out / "adapter_model.safetensors", {"format": "pt"})
config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "task_type": "CAUSAL_LM",
          "target_modules": [n.split(".")[1] for n in linear], "base_model_name_or_path": "synthetic"}
(out / "adapter_config.json").write_text(json.dumps(config))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where the inputs lie (1 GB); default: a temporary directory")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--before", type=Path, help="a checkout of d2surgery as it was, compared on one layer")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="report_speed_") as name:
        results = study(Path(name).resolve(), options.rounds, options.before, tiny=options.tiny)
    write(results, options.results)
    print(table(results))


def study(work: Path, rounds: int, before: Path | None, *, tiny: bool) -> dict[str, Any]:
    """The whole of results.json."""
    shapes = {"large": TINY, "one": TINY} if tiny else {"large": LARGE, "one": ONE}
    hashes = {}
    for name, count in {"large": 3 if tiny else MANY, "one": 2}.items():
        for number in range(count):
            python("-c", WRITE, work / f"{name}{number}", json.dumps(shapes[name]), 4 if tiny else RANK, SEED + number)
            hashes[f"{name}{number}"] = sha256(work / f"{name}{number}" / "adapter_model.safetensors")
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for name, command in commands(work, before, tiny=tiny).items():
            runs.append({"round": number, "run": name} | measure(command, before if "before" in name else None))
            print(f"{runs[-1]}", file=sys.stderr)
    return {
        "question": "How long and how much memory do diff and report take on adapters of an 8-billion-parameter model?",
        "machine": machine(),
        "versions": versions("safetensors", "plotly"),
        "seed": SEED,
        "inputs_sha256": hashes,
        "shapes": shapes,
        "rank": RANK,
        "rounds": rounds,
        "runs": runs,
        "ratios": ratios(runs),
    }


def commands(work: Path, before: Path | None, *, tiny: bool) -> dict[str, list[str]]:
    """Name -> words after `python -m d2surgery`."""
    many = sorted(map(str, work.glob("large*")))
    pair = sorted(map(str, work.glob("one*")))
    page = ["--out", str(work / "page.html"), "--quiet", "--force"]
    found = {
        "diff, 2 adapters": ["diff", *many[:2]],
        "report, 2 adapters": ["report", *many[:2], *page],
        f"diff, {len(many)} adapters": ["diff", *many],
        f"report, {len(many)} adapters": ["report", *many, *page],
        "diff, one layer": ["diff", *pair],
        "diff --exact-signs, one layer": ["diff", *pair, "--exact-signs"],
    }
    if tiny:  # imports alone, which the others have too
        return {name: words for name, words in found.items() if "report" not in name}
    return found | ({"diff as it was before, one layer": ["diff", *pair]} if before else {})


def measure(words: list[str], checkout: Path | None) -> dict[str, float]:
    """Of one process, which finds the package of the directory it stands in."""
    return process([sys.executable, "-m", "d2surgery", *words], cwd=checkout)


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CPU seconds of the ways that form every entry over today's, on one layer, round by round."""
    today = {run["round"]: run["cpu_seconds"] for run in runs if run["run"] == "diff, one layer"}
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["run"].endswith(", one layer") and run["run"] != "diff, one layer":
            found.setdefault(run["run"], []).append(run["cpu_seconds"] / max(today[run["round"]], 1e-3))
    return [
        {"run": name, "median": round(median(each), 2), "min": round(min(each), 2), "max": round(max(each), 2)}
        for name, each in found.items()
    ]


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    lines = ["| run | seconds: median (min to max) | CPU seconds | peak memory, MB | target |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["run"] for run in results["runs"]):
        mine = [run for run in results["runs"] if run["run"] == name]
        times = [run["seconds"] for run in mine]
        wall = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        cpu, peak = median(run["cpu_seconds"] for run in mine), max(run["peak_bytes"] for run in mine) / 1e6
        target = f"{TARGETS[name][0]:.0f} s, {TARGETS[name][1] / 1e6:.0f} MB" if name in TARGETS else ""
        lines.append(f"| {name} | {wall} | {cpu:.1f} | {peak:.0f} | {target} |")
    lines += ["", "| CPU seconds over those of `diff`, one layer | median (min to max) |", "|---|---|"]
    lines += [f"| {one['run']} | {one['median']} ({one['min']} to {one['max']}) |" for one in results["ratios"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
