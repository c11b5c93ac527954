"""What is the smallest damage to a merged weight that the audit sees, and does it ever fail a right merge?

python analyses/audit_truth/study.py [--base DIR] [--results DIR] [--tiny]
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import LoRA, audit, from_adapters, save

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, versions, write

HERE = Path(__file__).resolve().parent
SEED, RANK, SIZE, SHAPE = 0, 8, 0.01, (192, 256)  # SIZE: of the delta, ‖delta‖/‖W0‖
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODULES = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(4) for name in ("gate", "up")]
CHANGES = (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2)  # relative, of the elements that are changed
Damage = Callable[[Tensor, Tensor, float], Tensor]


def _part(where: Any) -> Damage:
    def damage(merged: Tensor, delta: Tensor, change: float) -> Tensor:
        out = merged.clone()
        out[where] *= 1 + change
        return out

    return damage


def _largest(merged: Tensor, delta: Tensor, change: float) -> Tensor:
    out = merged.flatten().clone()
    at = out.abs().topk(20).indices
    out[at] *= 1 + change
    return out.view(merged.shape)


def _low_rank(merged: Tensor, delta: Tensor, change: float) -> Tensor:
    noise = torch.outer(_normal(merged.shape[0], 1), _normal(merged.shape[1], 2))
    return merged + noise * (change * float(merged.norm() / noise.norm()))


def _white(merged: Tensor, delta: Tensor, change: float) -> Tensor:
    return merged * (1 + change * _normal(merged.numel(), 3).view(merged.shape))


def _normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DAMAGES: dict[str, Damage] = {
    "a row scaled": _part(5),
    "a column scaled": _part((slice(None), 5)),
    "32 rows scaled (a head)": _part(slice(32, 64)),
    "every fourth row scaled": _part(slice(None, None, 4)),
    "all scaled": _part(slice(None)),
    "the 20 largest elements scaled": _largest,
    "a constant added, of the mean size": lambda merged, delta, change: merged + change * merged.abs().mean(),
    "rank-1 noise": _low_rank,
    "noise without structure": _white,
    "the delta scaled": lambda merged, delta, change: merged + change * delta,
}
RIGHT: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # merges that no recipe gives; eps: of the dtype
    "products as inexact as TF32's": lambda m, d, eps: m + d * 2**-11 * _uniform(m, 1),
    "delta rounded to the dtype": lambda m, d, eps: m + d * eps / 2 * _uniform(m, 2),
    "rounded once more on the way": lambda m, d, eps: m * (1 + eps / 4 * _uniform(m, 3)),
    "another library": lambda m, d, eps: m + 2**-23 * d.norm() / d.numel() ** 0.5 * _uniform(m, 4),
}


def _uniform(like: Tensor, seed: int) -> Tensor:
    """Evenly between −1 and 1."""
    return 2 * torch.rand(like.shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, help="a checkpoint whose weights are taken; else synthetic ones")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json and the figure go")
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    changes = CHANGES[5:7] if options.tiny else CHANGES
    damages = dict(list(DAMAGES.items())[:2]) if options.tiny else DAMAGES
    with tempfile.TemporaryDirectory() as folder:
        dtypes = ["bfloat16"] if options.tiny else [*DTYPES]
        runs, alarms, digests = _measured(Path(folder), options.base, damages, changes, dtypes)
    results = {
        "question": "the smallest change that the audit sees, per dtype and structure; false alarms",
        "machine": machine(),
        "versions": versions(),
        "seed": SEED,
        "setting": {"rank": RANK, "size": SIZE, "shape": list(SHAPE), "modules": len(MODULES)},
        "base": "rows of " + options.base.name if options.base else "synthetic",
        "inputs_sha256": digests,
        "runs": runs,
        "right_merges": alarms,
        "seconds": round(time.monotonic() - began),
    }
    write(results, options.results)
    subprocess.run([sys.executable, str(HERE / "figure.py"), str(options.results)], check=True)
    print(table(results))


def _measured(
    folder: Path, base: Path | None, damages: dict[str, Damage], changes: tuple[float, ...], dtypes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    runs: list[dict[str, Any]] = []
    alarms: list[dict[str, Any]] = []
    digests = {}
    for name in dtypes:
        dtype = DTYPES[name]
        world = World(folder / name, _weights(base), dtype)
        digests[name] = hashlib.sha256((world.base / "model.safetensors").read_bytes()).hexdigest()
        for damage, way in damages.items():
            for change in changes:
                seen = world.failed(way, change)
                runs.append({"dtype": name, "damage": damage, "change": change, "seen": len(seen), "causes": seen})
        for merge, way in RIGHT.items():
            alarms.append(
                {
                    "dtype": name,
                    "merge": merge,
                    "modules": len(MODULES),
                    "failed": len(world.failed(way, torch.finfo(dtype).eps)),
                }
            )
    return runs, alarms, digests


class World:
    """A base of one kind of module, an adapter of each, and merges that are damaged in every module alike."""

    def __init__(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.base, self.adapter, self.merged = (folder / name for name in ("base", "adapter", "merged"))
        self.weights = {name: weight.to(dtype) for name, weight in weights.items()}
        self.values = {name: _adapter(weight, i) for i, (name, weight) in enumerate(self.weights.items())}
        for directory in (self.base, self.merged):
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        self._write(self.base, self.weights)
        save(from_adapters(self.values), self.adapter)

    def failed(self, damage: Damage, change: float) -> dict[str, str]:
        """Modules that fail, and by which name."""
        made = {}
        for name, W in self.weights.items():
            delta = self.values[name].delta(W.double())
            made[name] = damage(W.double() + delta, delta, change).to(self.dtype)  # from float64: twice rounded at most
        self._write(self.merged, made)
        found = audit(self.base, self.adapter, self.merged, files=False)
        return {name: module.code for name, module in found.modules.items() if module.verdict == "fail"}

    def _write(self, directory: Path, weights: dict[str, Tensor]) -> None:
        tensors = {f"{name}.weight": weight.contiguous() for name, weight in weights.items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _adapter(weight: Tensor, number: int) -> LoRA:
    """Singular values that fall like 1/i, as trained ones do."""
    A = _normal(RANK * weight.shape[1], 10 + number).view(RANK, -1).float()
    B = _normal(RANK * weight.shape[0], 50 + number).view(-1, RANK).float() / torch.arange(1, RANK + 1)
    return LoRA(A=A, B=B * (SIZE * float(weight.float().norm() / (B @ A).norm())), scaling=1.0)


def _weights(base: Path | None) -> dict[str, Tensor]:
    """Blocks of a checkpoint's own weights; else heavy-tailed ones with uneven rows and a few large columns."""
    if base is None:
        return {name: _synthetic(i) for i, name in enumerate(MODULES)}
    found: dict[str, Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            kept = [key for key in tensors.keys() if key.endswith(("gate_proj.weight", "up_proj.weight"))]  # noqa: SIM118
        found |= {key: tensor for key, tensor in load_file(file).items() if key in kept}
    chosen = sorted(found)[:: max(len(found) // len(MODULES), 1)][: len(MODULES)]
    return {name: found[key][: SHAPE[0], : SHAPE[1]].float() for name, key in zip(MODULES, chosen, strict=True)}


def _synthetic(seed: int) -> Tensor:
    rows, columns = SHAPE
    tails = _normal(rows * columns, seed) / _normal(rows * columns * 5, seed + 99).view(5, -1).square().mean(0).sqrt()
    weight = tails.view(rows, columns) * torch.exp(0.3 * _normal(rows, seed))[:, None]
    weight[:, seed :: columns // 2] *= 5
    return (0.04 * weight / weight.std()).float()


def table(results: dict[str, Any]) -> str:
    """The smallest change seen in every module, and from there on up; the share of right merges that failed."""
    dtypes = [*dict.fromkeys(run["dtype"] for run in results["runs"])]
    lines = ["| damage | " + " | ".join(dtypes) + " |", "|---" * (1 + len(dtypes)) + "|"]
    for damage in dict.fromkeys(run["damage"] for run in results["runs"]):
        cells = [
            _floor([r for r in results["runs"] if (r["dtype"], r["damage"]) == (d, damage)], results) for d in dtypes
        ]
        lines.append(f"| {damage} | " + " | ".join(cells) + " |")
    for merge in dict.fromkeys(run["merge"] for run in results["right_merges"]):
        each = [next(r for r in results["right_merges"] if (r["dtype"], r["merge"]) == (d, merge)) for d in dtypes]
        lines.append(f"| right: {merge} | " + " | ".join(f"{r['failed']} of {r['modules']} fail" for r in each) + " |")
    return "\n".join(lines)


def _floor(runs: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """From which change on every module fails; and which share fails at the one below."""
    every, floor = results["setting"]["modules"], None
    for run in sorted(runs, key=lambda run: -run["change"]):
        if run["seen"] < every:
            break
        floor = run
    if floor is None:
        return f"above {runs[-1]['change']:g}"
    below = [run for run in runs if run["change"] < floor["change"]]
    return f"{floor['change']:g}" + (f" ({below[-1]['seen']} of {every} at {below[-1]['change']:g})" if below else "")


if __name__ == "__main__":
    main()
