"""How long, how much memory and how exact are resizing and extracting, against the dense SVD, PEFT and mergekit?

Every run is one process from start to exit, imports included: wall clock, CPU seconds and the kernel's peak resident
memory. Errors of all are measured by one program. This process imports neither torch nor d2surgery.

    python analyses/surgery_speed/study.py --work DIR [--mergekit PYTHON] [--rounds N] [--tiny]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, process, python, sha256, versions, write

HERE = Path(__file__).resolve().parent
SEED, ROUNDS, RANK, KEPT = 0, 3, 64, 16
LARGE = {"hidden": 4096, "inner": 14336, "key": 1024, "layers": 32}  # an 8B model's adapter; there is no base
SMALL = {"hidden": 576, "inner": 1536, "key": 192, "layers": 2}  # SmolLM2's shape, two layers: for what is dense
# Two of the 16 layers of a 1.24-billion-parameter model: its matrices, which decide time per layer and peak memory.
MODEL = {"hidden": 2048, "inner": 8192, "key": 512, "layers": 2, "vocabulary": 1024}
WHOLE = MODEL | {"layers": 16, "vocabulary": 128256}  # all of it, for our extraction
SAMPLES = {
    (1024, 4096): 64,
    (4096, 4096): 64,
    (14336, 4096): 96,
}  # of one module of each a dense SVD; how many there are
TINY = {"hidden": 64, "inner": 128, "key": 32, "layers": 1, "vocabulary": 128}
PARTS = {"base": "base", "adapter": "adapter", "out": "tuned"}  # of a merge, and the folders where they lie

OURS = str(Path(sys.executable).with_name("d2surgery"))
WRITE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
out, shape, rank, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
numbers = torch.Generator().manual_seed(seed)
h, i, k = shape["hidden"], shape["inner"], shape["key"]
linear = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (k, h), "self_attn.v_proj": (k, h),
          "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
def normal(*size): return torch.randn(size, generator=numbers)
decay = 0.9 ** torch.arange(float(rank))
adapter, base = {}, {}
for layer in range(shape["layers"]):
    for name, (rows, columns) in linear.items():
        key = f"model.layers.{layer}.{name}"
        adapter[f"base_model.model.{key}.lora_A.weight"] = (normal(rank, columns) * decay[:, None]).bfloat16()
        adapter[f"base_model.model.{key}.lora_B.weight"] = (0.01 * normal(rows, rank)).bfloat16()
        if "vocabulary" in shape:
            base[f"{key}.weight"] = (0.02 * normal(rows, columns)).bfloat16()
    if "vocabulary" in shape:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.ones(h, dtype=torch.bfloat16)
folder = out / "adapter"
folder.mkdir(parents=True)
save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "task_type": "CAUSAL_LM",
          "target_modules": [n.split(".")[1] for n in linear], "base_model_name_or_path": "synthetic"}
(folder / "adapter_config.json").write_text(json.dumps(config))
if base:
    base["model.embed_tokens.weight"] = (0.02 * normal(shape["vocabulary"], h)).bfloat16()
    base["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
    (out / "base").mkdir()
    save_file(base, out / "base" / "model.safetensors", {"format": "pt"})
    heads = h // 64 if h > 64 else 4
    (out / "base" / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": i,
        "num_hidden_layers": shape["layers"], "num_attention_heads": heads, "head_dim": h // heads,
        "num_key_value_heads": k * heads // h, "vocab_size": shape["vocabulary"], "tie_word_embeddings": True,
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "_name_or_path": "synthetic"}))
"""
# The steps of sd-scripts' networks/resize_lora.py: B·A in full, torch.linalg.svd with its full matrices, one cut.
DENSE = """
import sys, torch
from safetensors.torch import load_file, save_file
from pathlib import Path
tensors, rank, out = load_file(sys.argv[1] + "/adapter_model.safetensors"), int(sys.argv[2]), Path(sys.argv[3])
made = {}
for key in [k for k in tensors if "lora_A" in k]:
    A, B = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
    U, S, Vh = torch.linalg.svd(B @ A)
    made[key] = Vh[:rank].contiguous()
    made[key.replace("lora_A", "lora_B")] = (U[:, :rank] * S[:rank]).contiguous()
out.mkdir()
save_file(made, out / "adapter_model.safetensors", {"format": "pt"})
config = (Path(sys.argv[1]) / "adapter_config.json").read_text()
r = __import__("json").loads(config)
(out / "adapter_config.json").write_text(__import__("json").dumps(r | {"r": rank, "lora_alpha": rank}))
"""
ONE = """
import sys, time, torch
rows, columns = int(sys.argv[1]), int(sys.argv[2])
numbers = torch.Generator().manual_seed(0)
B, A = torch.randn(rows, 64, generator=numbers), torch.randn(64, columns, generator=numbers)
began = time.monotonic()
torch.linalg.svd(B @ A)
print(time.monotonic() - began)
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2], adapter_name="old")
model.add_weighted_adapter(["old", "old"], [0.5, 0.5], "new", combination_type="svd", svd_rank=int(sys.argv[3]))
model.delete_adapter("old")
model.save_pretrained(sys.argv[4], selected_adapters=["new"])
"""
ERRORS = """
import sys, torch
from d2surgery import BaseWeights, load
torch.set_num_threads(1)
made, whole, wrong = load(sys.argv[1]), 0.0, 0.0
some = list(made)[:7] + list(made)[-7:]
if len(sys.argv) == 3:
    wanted = load(sys.argv[2])
    for module in some:
        update, got = wanted[module].update(), made[module].update()
        whole += float(update.frobenius_norm()) ** 2
        wrong += float((update + -1.0 * got).frobenius_norm()) ** 2
else:
    base, tuned = map(BaseWeights, sys.argv[2:])
    for module in some:
        change = tuned[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        whole += float(change.square().sum())
        wrong += float((change - made[module].update().dense()).square().sum())
print((wrong / whole) ** 0.5)  # of the first and the last layer
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="where the inputs and outputs lie (8 GB); default: a temporary one")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--mergekit", help="the Python of an environment that has mergekit 0.1.4")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="surgery_speed_") as name:
        results = study(Path(name).resolve(), options.rounds, options.mergekit, tiny=options.tiny)
    write(results, options.results)
    print(table(results))


def study(work: Path, rounds: int, mergekit: str | None, *, tiny: bool) -> dict[str, Any]:
    """The whole of results.json."""
    small, model, whole = (TINY,) * 3 if tiny else (SMALL | {"vocabulary": 1024}, MODEL, WHOLE)
    large = {name: size for name, size in TINY.items() if name != "vocabulary"} if tiny else LARGE
    samples, kept, rank = {(32, 64): 7} if tiny else SAMPLES, 4 if tiny else KEPT, 8 if tiny else RANK
    runs: list[dict[str, Any]] = []
    hashes = {}
    shapes = {"large": (large, rank), "small": (small, rank), "model": (model, kept), "whole": (whole, kept)}
    for name, (shape, of) in shapes.items():
        python("-c", WRITE, work / name, json.dumps(shape), of, SEED)
        if name in ("model", "whole"):
            merge = [f"--{what}={work / name / where}" for what, where in PARTS.items()]
            subprocess.run([OURS, "merge", "--quiet", *merge], check=True)
        for file in sorted((work / name).glob("*/*.safetensors")):
            hashes[f"{name}/{file.parent.name}"] = sha256(file)
    for number in range(rounds):
        for name, command in commands(work, kept, mergekit).items():
            if tiny and ("large" in name or "PEFT" in name):  # imports alone, which the others have too
                continue
            runs.append({"round": number, "run": name} | measure(work, command))
            print(f"{runs[-1]}", file=sys.stderr)
    dense = [
        {"shape": list(s), "modules": count, "seconds": round(float(python("-c", ONE, *s)), 3)}
        for s, count in samples.items()
    ]
    return {
        "question": "How long, how much memory and how exact are resizing and extracting, against the dense SVD, PEFT "
        "and mergekit?",
        "machine": machine(),
        "versions": versions("transformers", "peft", "safetensors"),
        "seed": SEED,
        "inputs_sha256": hashes,
        "shapes": {name: shape for name, (shape, _) in shapes.items()},
        "rank": rank,
        "kept": kept,
        "rounds": rounds,
        "runs": runs,
        "dense_svd_of_one_module": dense,
    }


def commands(work: Path, kept: int, mergekit: str | None) -> dict[str, tuple[list[str], tuple[Path, ...]]]:
    """Name -> command but for the output, its last word, and what its error is measured against."""
    large, small, model, whole = (work / name for name in ("large", "small", "model", "whole"))
    resize = [OURS, "resize", "--quiet", "--rank", str(kept)]
    extract = [OURS, "extract", "--quiet", "--rank", str(kept)]

    def between(folder: Path) -> list[str]:
        return ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--out"]

    found: dict[str, tuple[list[str], tuple[Path, ...]]] = {
        "resize, large: d2surgery": ([*resize, str(large / "adapter")], (large / "adapter",)),
        "resize, small: d2surgery": ([*resize, str(small / "adapter")], (small / "adapter",)),
        "resize, small: dense SVD as kohya's": (
            [sys.executable, "-c", DENSE, str(small / "adapter"), str(kept)], (small / "adapter",)),
        "extract, model: d2surgery": ([*extract, *between(model)], (model / "base", model / "tuned")),
        "extract, all 16 layers: d2surgery": ([*extract, *between(whole)], (whole / "base", whole / "tuned")),
        "resize, small: PEFT svd": (
            [sys.executable, "-c", PEFT, str(small / "base"), str(small / "adapter"), str(kept)], (small / "adapter",)),
    }  # fmt: skip
    if mergekit:
        tool = str(Path(mergekit).with_name("mergekit-extract-lora"))
        words = ["--model", str(model / "tuned"), "--base-model", str(model / "base"), "--max-rank", str(kept)]
        found["extract, model: mergekit"] = ([tool, *words, "--out-path"], (model / "base", model / "tuned"))
    return found


def measure(work: Path, asked: tuple[list[str], tuple[Path, ...]]) -> dict[str, float]:
    """Of one whole process, with the relative error of what it wrote."""
    command, against = asked
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    found = process([*command, str(out)])
    made = out / "new" if (out / "new").exists() else out
    return found | {"error": float(python("-c", ERRORS, made, *against))}


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| run | seconds: median (min to max) | CPU seconds | peak memory, MB | error |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["run"] for run in results["runs"]):
        mine = [run for run in results["runs"] if run["run"] == name]
        times = [run["seconds"] for run in mine]
        wall = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        cpu, peak = median(run["cpu_seconds"] for run in mine), max(run["peak_bytes"] for run in mine) / 1e6
        lines.append(f"| {name} | {wall} | {cpu:.1f} | {peak:.0f} | {mine[0]['error']:.6f} |")
    lines += ["", "| one dense SVD of the large adapter | modules | seconds of one |", "|---|---|---|"]
    every = results["dense_svd_of_one_module"]
    for one in every:
        lines.append(f"| {one['shape'][0]} × {one['shape'][1]} | {one['modules']} | {one['seconds']:.1f} |")
    lines.append(f"| all, reckoned | | {sum(one['modules'] * one['seconds'] for one in every):,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
