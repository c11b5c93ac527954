"""Deltas in the wrong place and scalings by the wrong rank: each is named, and the right merge beside it passes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_llama
from models import CASES, Built
from safetensors.torch import load_file, save_file
from torch import Tensor

import d2surgery
from d2surgery.adapters import LoRA
from d2surgery.auditing.findings import Audit

CONFIG = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
Deltas = Mapping[str, Tensor]
LAYERS = [f"model.layers.{n}.mlp.down_proj" for n in range(12)]
EXPERTS = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(12)]
GATED = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
QKV, BOTH = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"


def audited(directory: Path, modules: list[str], wrong: Callable[[Deltas], Deltas] | None, rows: int = 32) -> Audit:
    """A base, a LoRA of its modules, and both merged by the formula, with what `wrong` makes of the deltas."""
    weights = {m: torch.from_numpy(toy_llama.numbers(rows, 32, seed=at)) for at, m in enumerate(modules)}
    adapters = {
        m: LoRA(A=torch.from_numpy(toy_llama.numbers(4, 32, seed=100 + at)), scaling=0.5,
                B=torch.from_numpy(toy_llama.numbers(rows, 4, seed=200 + at)))
        for at, m in enumerate(modules)
    }  # fmt: skip
    deltas: Deltas = {m: a.delta(weights[m].double()) for m, a in adapters.items()}
    d2surgery.save(d2surgery.from_adapters(adapters), directory / "adapter")
    changed = wrong(deltas) if wrong else deltas
    for name, values in (
        ("base", weights),
        ("merged", {m: (W.double() + changed[m]).float() for m, W in weights.items()}),
    ):
        toy_llama.save({f"{m}.weight": W for m, W in values.items()}, directory / name / "model.safetensors")
        (directory / name / "config.json").write_text(json.dumps(CONFIG))
    found: Audit = d2surgery.audit(directory / "base", directory / "adapter", directory / "merged", files=False)
    return found


def as_text(deltas: Deltas) -> Deltas:
    """0, 1, 10, 11, 2 …"""
    return dict(zip(deltas, (deltas[m] for m in sorted(deltas)), strict=True))


def backwards(deltas: Deltas) -> Deltas:
    return dict(zip(deltas, [*deltas.values()][::-1], strict=True))


def one_on(deltas: Deltas) -> Deltas:
    values = [*deltas.values()]
    return dict(zip(deltas, values[1:] + values[:1], strict=True))


@pytest.mark.parametrize("modules", [LAYERS, EXPERTS, GATED], ids=["layers", "experts", "gate and up"])
@pytest.mark.parametrize("wrong", [as_text, backwards, one_on])
def test_a_delta_of_another_place_is_named(
    tmp_path: Path, modules: list[str], wrong: Callable[[Deltas], Deltas]
) -> None:
    found = audited(tmp_path, modules, wrong)
    order = [*wrong({m: torch.tensor(float(at)) for at, m in enumerate(modules)}).values()]
    moved = {m: modules[int(at)] for m, at in zip(modules, order, strict=True) if modules[int(at)] != m}
    assert found.verdict == ("fail" if moved else "pass")
    assert {name for name, module in found.modules.items() if module.code} == moved.keys()
    for name, origin in moved.items():
        assert found.modules[name].code == "DELTA_MISPLACED"
        assert found.modules[name].message == f"the delta of {origin}"


def test_experts_of_one_parameter_in_another_order_are_named(tmp_path: Path) -> None:
    built = Built(CASES["qwen3 moe"], tmp_path)
    base, right = (load_file(path / "model.safetensors") for path in (built.base, built.merged))
    changed = dict(right)
    experts = [name for name in right if ".experts." in name and not torch.equal(right[name], base[name])]
    for name in experts:
        before, _, rest = name.rpartition(".experts.")
        number, _, after = rest.partition(".")
        origin = f"{before}.experts.{(int(number) + 1) % 4}.{after}"
        changed[name] = (base[name].double() + (right[origin].double() - base[origin].double())).float()
    (built.merged / "d2surgery_merge.json").unlink()
    save_file(changed, built.merged / "model.safetensors", metadata={"format": "pt"})
    found = d2surgery.audit(built.base, built.adapter, built.merged, files=False)
    wrong = {name: module for name, module in found.modules.items() if module.code}
    assert wrong.keys() == {name for name in found.modules if "experts" in name} != set()
    assert {module.code for module in wrong.values()} == {"DELTA_MISPLACED"}
    assert all("expert" in module.message for module in wrong.values())


def grouped(rows: int) -> Tensor:
    """The rows of 4 query and 2 key-value heads of 8, from q | k | v to q q k v of each group."""
    q, k, v = np.split(np.arange(rows), [32, 48])
    return torch.from_numpy(np.concatenate([np.r_[q[16 * g :][:16], k[8 * g :][:8], v[8 * g :][:8]] for g in (0, 1)]))


ORDERS: list[tuple[str, str, Callable[[int], Tensor], str]] = [
    ("grouped", QKV, grouped, "query, key and value from blocks to groups"),
    ("blocks", QKV, lambda rows: grouped(rows).argsort(), "query, key and value from groups"),
    ("interleaved", BOTH, lambda rows: torch.arange(rows).view(2, -1).T.reshape(-1), "gate and up from halves"),
    ("halves", BOTH, lambda rows: torch.arange(rows).view(-1, 2).T.reshape(-1), "gate and up from interleaved"),
    ("exchanged", BOTH, lambda rows: torch.arange(rows).roll(rows // 2), "gate and up exchanged"),
]


@pytest.mark.parametrize(("name", "module", "order", "says"), ORDERS, ids=[order[0] for order in ORDERS])
def test_rows_of_a_fused_delta_in_another_order_are_named(
    tmp_path: Path, name: str, module: str, order: Callable[[int], Tensor], says: str
) -> None:
    rows = order(64)
    found = audited(tmp_path, [module], lambda deltas: {module: deltas[module][rows]}, rows=64).modules[module]
    assert (found.verdict, found.code) == ("fail", "ROWS_PERMUTED")
    assert says in found.message


SCALES = [  # alpha, rank, scale that was merged, what is said
    (1.0, 4, 1.0, "its alpha of 1 was forgotten"),
    (6.0, 4, 0.25, "1/r, an alpha of 1"),
    (6.0, 4, 6.0, "alpha, not divided by the rank"),
    (6.0, 4, 0.75, "alpha over another module's rank, 8"),
    (6.0, 4, 0.5, "alpha over 3 times the rank"),
    (6.0, 4, 0.375, "alpha over 4 times the rank"),
]


@pytest.mark.parametrize(("alpha", "rank", "scale", "says"), SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scaling_by_the_wrong_alpha_or_rank_is_named(
    tmp_path: Path, alpha: float, rank: int, scale: float, says: str, dtype: torch.dtype
) -> None:
    """kohya's file of two modules, the other of rank 8."""
    tensors, base, merged = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for at, (name, r) in enumerate((("q_proj", rank), ("v_proj", 8))):
        module, flat = f"model.layers.0.self_attn.{name}", f"lora_te_layers_0_self_attn_{name}"
        A, B, W = (
            torch.from_numpy(toy_llama.numbers(*shape, seed=10 * at + i))
            for i, shape in enumerate(((r, 64), (64, r), (64, 64)))
        )
        W = W.to(dtype)
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(alpha)}
        base[f"{module}.weight"] = W
        used = scale if name == "q_proj" else alpha / 8
        merged[f"{module}.weight"] = (W.double() + used * (B.double() @ A.double())).to(dtype)
    for name, values in (("base", base), ("merged", merged)):
        toy_llama.save(values, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    adapter = toy_llama.save(tensors, tmp_path / "x.safetensors")
    found = d2surgery.audit(tmp_path / "base", adapter, tmp_path / "merged", files=False).modules
    module = found["model.layers.0.self_attn.q_proj"]
    assert (module.verdict, module.code) == ("fail", "WRONG_STRENGTH")
    assert says in module.message
    assert found["model.layers.0.self_attn.v_proj"].verdict == "pass"
