"""What rank do the four kinds of adapter reach, layer by layer, when each is fitted to the same change of the weights?

And how much faster is a spectrum from the factors than from the formed matrix?

    python analyses/rank_by_layer/study.py [--results DIR] [--tiny]
"""

import argparse
import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from d2surgery import KINDS, Adapter, LoRA, delta_spectrum, update_spectrum

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, versions, write

HERE = Path(__file__).resolve().parent
SEED = 0
RANKS = {"lora": 16, "dora": 16, "duallora": 8, "d2lora": 8}  # the same number of parameters for all
NAMES = {"lora": "LoRA", "dora": "DoRA", "duallora": "Dual LoRA", "d2lora": "D2-LoRA"}
BOUND = {"lora": "r = 16", "dora": "r = 16", "duallora": "none (r₁ = r₂ = 8)", "d2lora": "2r = 16"}
SIZE = 0.02  # ‖target‖/‖W0‖
DECAY = (0.4, 1.2)  # the target's σᵢ = i^−decay, from the first layer to the last
BASE_DECAY = 0.3
RATE = {"lora": 3e-3, "dora": 3e-3, "duallora": 3e-3, "d2lora": 3e-3}


class Setting(NamedTuple):
    layers: int
    shapes: dict[str, tuple[int, int]]
    steps: int
    speed: dict[str, tuple[int, int]]
    speed_rank: int


FULL = Setting(
    layers=8,
    shapes={"attention": (128, 128), "mlp": (192, 128)},
    steps=300,
    speed={"k_proj": (1024, 4096), "q_proj": (4096, 4096)},  # of an 8B Llama
    speed_rank=64,
)
TINY = Setting(2, {"attention": (24, 24), "mlp": (36, 24)}, 20, {"k_proj": (32, 64)}, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json and the figure go")
    parser.add_argument("--tiny", action="store_true", help="a few seconds; the numbers mean nothing")
    options = parser.parse_args()
    results = study(TINY if options.tiny else FULL)
    write(results, options.results)
    subprocess.run([sys.executable, str(HERE / "figure.py"), str(options.results)], check=True)
    print(table(results))


def study(setting: Setting) -> dict[str, Any]:
    """The whole of results.json."""
    torch.set_num_threads(1)  # these matrices are too small for two
    runs, digest = [], hashlib.sha256()
    for layer in range(setting.layers):
        for name, shape in setting.shapes.items():
            generator = Generator().manual_seed(SEED + 1000 * layer + len(name))
            base, target = problem(shape, layer / max(setting.layers - 1, 1), generator)
            digest.update(base.numpy().tobytes() + target.numpy().tobytes())
            for kind in KINDS:
                adapter = fitted(kind, base, target, setting.steps, generator)
                runs.append({"layer": layer, "module": name, "kind": kind} | measured(adapter, base, target))
            print(f"layer {layer} {name}", file=sys.stderr)
    return {
        "question": "What rank do the four kinds reach, layer by layer, fitted to the same change of the weights?",
        "machine": machine(threads=1),
        "versions": versions(),
        "seed": SEED,
        "setting": setting._asdict() | {"ranks": RANKS, "size": SIZE, "decay": DECAY, "base_decay": BASE_DECAY},
        "inputs_sha256": {"bases and targets": digest.hexdigest()},
        "runs": runs,
        "speed": [speed(name, shape, setting.speed_rank) for name, shape in setting.speed.items()],
    }


def problem(shape: tuple[int, int], depth: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A base and the change that training asks for, both with power-law spectra, unrelated directions."""
    decay = DECAY[0] + (DECAY[1] - DECAY[0]) * depth
    base, target = (power_law(shape, exponent, generator) for exponent in (BASE_DECAY, decay))
    return base, target * (SIZE * base.norm() / target.norm())


def power_law(shape: tuple[int, int], decay: float, generator: Generator) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(side, min(shape), generator=generator)).Q for side in shape)
    sigma = torch.arange(1, min(shape) + 1, dtype=torch.float32) ** -decay
    product: Tensor = (U * sigma) @ V.T
    return product


def fitted(kind: str, base: Tensor, target: Tensor, steps: int, generator: Generator) -> Adapter:
    """Adam on ‖delta − target‖²/‖target‖² from the kind's own start; the sign's gradient is masked."""
    fresh = KINDS[kind].init(base, rank=RANKS[kind], scaling=1.0, generator=generator)
    fresh = replace(fresh, **{"ste": "mask"} if kind == "duallora" else {})
    slots = {name: slot.clone().requires_grad_() for name, slot in fresh.slots().items()}
    optimizer = torch.optim.Adam(slots.values(), lr=RATE[kind])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        adapter = replace(fresh, **slots)
        ((adapter.delta(base) - target).square().sum() / target.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return replace(fresh, **{name: slot.detach() for name, slot in slots.items()})


def measured(adapter: Adapter, base: Tensor, target: Tensor) -> dict[str, Any]:
    """Ranks of the update (null where it has no factors) and of the delta; what of the target is missed."""
    delta = delta_spectrum(adapter, base, "exact")
    floor = delta.error_bound * delta.spectral_norm
    update = None if adapter.update() is None else update_spectrum(adapter)
    missed = float((adapter.delta(base) - target).norm() / target.norm())
    return {
        "update_rank": None if update is None else update.numerical_rank,
        "delta_rank": int((delta.singular_values > floor).sum()),
        "full_rank": min(base.shape),
        "delta_entropy_rank": round(delta.entropy_rank, 3),
        "delta_energy_entropy_rank": round(delta.energy_entropy_rank, 3),
        "delta_energy_rank_99": delta.energy_rank_99,
        "missed": round(missed, 4),
    }


def speed(name: str, shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Seconds for all singular values of one LoRA: from the factors, and by float32 svdvals of the formed matrix."""
    generator = Generator().manual_seed(SEED)
    out, in_ = shape
    slots = {"A": torch.randn(rank, in_, generator=generator), "B": torch.randn(out, rank, generator=generator)}
    adapter = LoRA(**slots, scaling=1.0)
    update_spectrum(adapter)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        sigma = update_spectrum(adapter).singular_values
        seconds.append(time.monotonic() - began)
    formed = adapter.B @ adapter.A
    began = time.monotonic()
    dense = torch.linalg.svdvals(formed if out <= in_ else formed.T)
    dense_seconds = time.monotonic() - began
    agreement = float(((dense[:rank].double() - sigma).abs() / sigma[0]).max())
    return {
        "module": name, "shape": list(shape), "rank": rank, "seconds": round(min(seconds), 5),
        "dense_seconds": round(dense_seconds, 3), "ratio": round(dense_seconds / min(seconds)),
        "largest_difference": float(f"{agreement:.2g}"),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    heads = ["kind", "bound on the update", "rank of the update", "rank of the delta, of full"]
    heads += ["directions for 99 % of the energy", "energy entropy rank", "entropy rank", "target missed"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind, name in NAMES.items():
        mine = [run for run in results["runs"] if run["kind"] == kind]
        full = mean(run["delta_rank"] / run["full_rank"] for run in mine)
        cells = [
            name,
            BOUND[kind],
            span([run["update_rank"] for run in mine]),
            f"{span([run['delta_rank'] for run in mine])} ({100 * full:.0f} %)",
            *(span([run[key] for run in mine]) for key in
              ("delta_energy_rank_99", "delta_energy_entropy_rank", "delta_entropy_rank")),
            f"{mean(run['missed'] for run in mine):.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| module | rank | from the factors | svdvals of the formed matrix | ratio | largest difference/σ₁ |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for one in results["speed"]:
        shape = " × ".join(map(str, one["shape"]))
        lines.append(
            f"| {one['module']}, {shape} | {one['rank']} | {1000 * one['seconds']:.3g} ms | "
            f"{one['dense_seconds']:.3g} s | {one['ratio']} | {one['largest_difference']:g} |"
        )
    return "\n".join(lines)


def span(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "no factors"
    low, high = (f"{value:.3g}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
