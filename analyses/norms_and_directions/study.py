"""What did the four kinds learn, module by module: directions, lengths, and where D2-LoRA's projection leaves them?

python analyses/norms_and_directions/study.py --base DIR --data DIR --cells DIR
python analyses/norms_and_directions/study.py --tiny
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import d2surgery
from d2surgery import Adapter, BaseWeights, Checkpoint, D2LoRA

sys.path.insert(0, str(Path(__file__).parents[1]))
from cells import Cell, cells_in, lacking, options_of, said_of_lacking, some_of_each, tiny_cells
from four_kinds.study import SEED, SETS, TINY_ARMS, rewritten
from studying import machine, python, sha256, versions, write

HERE = Path(__file__).resolve().parent
QUESTION = "What did the four kinds learn, module by module, and where does D2-LoRA's projection leave it?"
RANKS = ("energy_entropy_rank", "energy_rank_90", "energy_rank_99", "relative_update")
FORMS = {"projected_plus_update": "Ŵ = W* + ΔW", "projected": "W*", "update": "W0 + ΔW"}
ROWS, FLOOR = 16, 3e-8  # of a batch whose gradient is looked at; of σ₁, what the exact method sees


def main() -> None:
    parser = options_of(QUESTION)
    parser.add_argument("--base", type=Path, help="that the cells were trained on")
    parser.add_argument("--data", type=Path, help="where NAME-test.json.gz lies (LLM-Adapters' commonsense sets)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.data = Path(scratch)
            options.base, options.cells = tiny_cells(Path(scratch), (*TINY_ARMS, "DoRA r16", "Dual LoRA 8+8"), 1)
        if not (options.base and options.data and options.cells):
            parser.error("--base, --data and --cells, or --tiny")
        results = study(options.base, options.data, options.cells)
    to = options.results or HERE
    write(results, to)
    subprocess.run([sys.executable, str(HERE / "figure.py"), str(to)], check=True)
    print(table(results))


def study(base: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The whole of results.json."""
    cells = some_of_each(cells_in(folder), base.name, 1)
    items = [item for name in SETS["small"] for item in list(rewritten(data / f"{name}-test.json.gz"))[: ROWS // 2]]
    return {
        "question": QUESTION,
        "machine": machine(threads=1),
        "versions": versions("transformers"),
        "seed": SEED,
        "inputs_sha256": {Path(cell["folder"]).name: sha256(Path(cell["folder"]) / "adapter_model.safetensors")
                          for cell in cells},
        "lacking": lacking(cells, 1),
        "arms": [of_cell(base, cell, items) for cell in cells],
    }  # fmt: skip


def of_cell(base: Path, cell: Cell, items: Sequence[dict[str, str]]) -> dict[str, Any]:
    folder = cell["folder"]
    print(cell["arm"], file=sys.stderr)
    checkpoint, weights = d2surgery.load(folder), BaseWeights(base)
    drift = json.loads(python("-m", "d2surgery", "drift", folder, "--base", base, "--along", "out_features", "--json"))
    moved = {row["module"]: row for row in drift["modules"]}
    spectra = d2surgery.spectrum(folder, base, of="delta")
    rows = [row | {"relative_update": moved[row["module"]]["relative_update"]} for row in spectra.rows()]
    reached = [
        float((one.singular_values > FLOOR * one.spectral_norm).sum()) / min(one.shape) for one in spectra.values()
    ]
    return {
        "arm": cell["arm"], "seed": cell["seed"], "lr": cell["lr"],
        "full_rank": mean(reached),
        "modules": {name: spread(row[name] for row in rows) for name in RANKS},
        "by_type": {kind: {name: mean(row[name] for row in rows if row["type"] == kind) for name in RANKS}
                    for kind in dict.fromkeys(row["type"] for row in rows)},
        "by_layer": {layer: {name: mean(row[name] for row in rows if row["layer"] == layer) for name in RANKS}
                     for layer in dict.fromkeys(row["layer"] for row in rows)},
        "magnitude_direction": drift["correlation"],
        "column_norms": {form: spread(lengths) for form, lengths in column_norms(checkpoint, weights).items()},
        "radial": radial(base, checkpoint, weights, items),
    }  # fmt: skip


def spread(values: Iterable[float]) -> dict[str, float]:
    """Quantiles; `size` is the mean of the absolute values."""
    held = np.fromiter(values, float)
    low, middle, high = np.quantile(held, [0.05, 0.5, 0.95])
    return {"low": low, "median": middle, "high": high, "largest": np.abs(held).max(), "size": np.abs(held).mean()}


# Norms of columns -----------------------------------------------------------------------------------------------------


def column_norms(checkpoint: Checkpoint, weights: BaseWeights) -> dict[str, list[float]]:
    """Form -> ‖w′‖/‖w‖ − 1 of every column of every module, from the formed weights in float64."""
    found: dict[str, list[float]] = {}
    for module, adapter in checkpoint.items():
        W = weights[f"{module}.weight"].double()
        for form, one in forms(adapter):
            found.setdefault(form, []).extend(((W + one.delta(W)).norm(dim=0) / W.norm(dim=0) - 1).tolist())
    return found


def forms(adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """Of D2-LoRA the effective weight, the projected one and that which is projected; of others the effective one."""
    if isinstance(adapter, D2LoRA):
        yield from ((name, replace(adapter, form=form)) for form, name in FORMS.items())
    else:
        yield "W′", adapter


# The gradient, along the columns and across them ----------------------------------------------------------------------


def radial(
    base: Path, checkpoint: Checkpoint, weights: BaseWeights, items: Sequence[dict[str, str]]
) -> dict[str, float]:
    """Shares of ‖gradient‖² of all modules that lie along the columns of W′, of D2-LoRA along those of W0 + ΔW.

    `weight`: of dL/dW′, which is dL/dΔW where nothing is projected; `update`: of dL/dΔW as D2-LoRA's projection
    passes it on; `chance`: of a random gradient, one over the length of a column.
    """
    gradients = weight_gradients(base, checkpoint, weights, items)
    sums = {"weight": np.zeros(2), "update": np.zeros(2), "chance": np.zeros(2)}
    for module, adapter in checkpoint.items():
        W, G = weights[f"{module}.weight"].double(), gradients[module].double()
        projects = isinstance(adapter, D2LoRA)
        update = (replace(adapter, form="update") if isinstance(adapter, D2LoRA) else adapter).delta(W)
        whole = float(G.square().sum())
        sums["weight"] += along_and_whole(G, W + update)
        sums["chance"] += [whole / W.shape[0], whole]
        if projects:
            sums["update"] += along_and_whole(through_projection(G, W, update), W + update)
    return {name: along / whole for name, (along, whole) in sums.items() if whole}


def along_and_whole(gradient: Tensor, columns: Tensor) -> list[float]:
    """Σ_j <g_j, w_j>²/‖w_j‖² and ‖G‖²."""
    along = (gradient * columns).sum(0).square() / columns.square().sum(0)
    return [float(along.sum()), float(gradient.square().sum())]


def through_projection(gradient: Tensor, W: Tensor, update: Tensor) -> Tensor:
    """dL/dΔW from dL/dŴ, Ŵ = (W0 + ΔW)·‖w0‖/‖w0 + Δw‖ + ΔW, by torch."""
    moved = update.clone().requires_grad_()
    projected = (W + moved) * (W.norm(dim=0) / (W + moved).norm(dim=0))
    (found,) = torch.autograd.grad(((projected + moved) * gradient).sum(), moved)
    return found


def weight_gradients(
    base: Path, checkpoint: Checkpoint, weights: BaseWeights, items: Sequence[dict[str, str]]
) -> dict[str, Tensor]:
    """Module -> dL/dW′ of the loss on the answers' tokens, the mean over all of them, at the trained weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for module, adapter in checkpoint.items():
        W = weights[f"{module}.weight"].float()
        model.get_submodule(module).weight = torch.nn.Parameter(W + adapter.delta(W))
    asked = [tokenizer(prompt(tokenizer, item["question"]), add_special_tokens=False)["input_ids"] for item in items]
    said = [tokenizer(item["answer"], add_special_tokens=False)["input_ids"] for item in items]
    for question, answer in zip(asked, said, strict=True):
        labels = torch.tensor([[-100] * len(question) + answer])
        loss = model(input_ids=torch.tensor([question + answer]), labels=labels).loss
        (loss * len(answer) / sum(map(len, said))).backward()
    return {module: model.get_submodule(module).weight.grad for module in checkpoint}


def prompt(tokenizer: Any, question: str) -> str:
    """As in training: the chat template where there is one."""
    if not tokenizer.chat_template:
        return f"{question}\n"
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


# What is said ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    arms = results["arms"]
    if not arms:
        return "**Not run.** No number stands here yet."
    heads = ["arm", "rank of the delta, of full", "energy entropy rank", "directions for 90 % of the energy",
             "for 99 %", "‖delta‖/‖W0‖, %", "highest and lowest type", "first and last third of layers"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in arms:
        modules, used = one["modules"], "energy_entropy_rank"
        types = sorted(((numbers[used], kind) for kind, numbers in one["by_type"].items()), reverse=True)
        layers = [layer[used] for layer in one["by_layer"].values()]
        third = max(len(layers) // 3, 1)
        cells = [
            one["arm"], f"{100 * one['full_rank']:.0f} %", said(modules[used]), said(modules["energy_rank_90"]),
            said(modules["energy_rank_99"]), said(modules["relative_update"], 100),
            ", ".join(f"{kind} {rank:.3g}" for rank, kind in (types[0], types[-1])),
            f"{mean(layers[:third]):.3g}, {mean(layers[-third:]):.3g}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["arm", "ΔM against ΔD, Pearson", "of random updates", "column norms of", "mean change, %",
             "5 to 95 % of columns", "largest", "gradient along columns", "passed on to ΔW", "by chance"]  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in arms:
        related, shares = one["magnitude_direction"], one["radial"]
        for number, (form, change) in enumerate(one["column_norms"].items()):
            first = [
                one["arm"],
                f"{related['pearson']:+.2f}",
                f"{related['null_mean']:+.2f} ± {related['null_sd']:.2f}",
            ]
            shown = [f"{100 * change['size']:.2g}", f"{100 * change['low']:+.2g} to {100 * change['high']:+.2g}",
                     f"{100 * change['largest']:.2g}"]  # fmt: skip
            last = [f"{100 * shares[name]:.3g} %" if name in shares else "" for name in ("weight", "update", "chance")]
            cells = [*(first if not number else ["", "", ""]), form, *shown, *(last if not number else ["", "", ""])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + said_of_lacking(results["lacking"]))


def said(one: dict[str, float], times: float = 1) -> str:
    return f"{times * one['median']:.3g} ({times * one['low']:.3g} to {times * one['high']:.3g})"


if __name__ == "__main__":
    main()
