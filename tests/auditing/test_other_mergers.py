"""What other tools' mergers do, by their formulas: right merges by the recipe's name, wrong ones by the cause's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import effective, make
from mutations import Case, World, formula
from mutations.changes import delta, stale_norm, wide
from torch import Tensor

from d2surgery.adapters import DoRA, LoRA
from d2surgery.auditing import audit
from d2surgery.auditing.findings import Audit
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import RECIPES

BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("mergers"))


def audited(world: World, out: Path, kind: str, f: Any, *, strength: float = 1.0, dtype: str = "F32") -> Audit:
    case = Case(group="", name="", kind=kind, dtype=dtype, change=formula(f), verdict="")
    setting = case.build(world, out)
    return audit(setting.base, setting.adapter, out, strength=strength, files=False)


def unscaled(adapter: Any, W: Tensor) -> Any:
    """AdapterHub's merge of DoRA."""
    whole = wide(W) + wide(adapter.B) @ wide(adapter.A)
    return wide(adapter.magnitude)[:, None] * whole / np.sqrt((whole**2).sum(1, keepdims=True))


def inside(adapter: Any, W: Tensor) -> Any:
    """PEFT's and diffusers' strength 0.5 of DoRA."""
    whole = wide(W) + adapter.scaling / 2 * (wide(adapter.B) @ wide(adapter.A))
    return wide(adapter.magnitude)[:, None] * whole / np.sqrt((whole**2).sum(1, keepdims=True))


def gain_alone(adapter: Any, W: Tensor) -> Any:
    """LyCORIS's strength 0.5 of DoRA: (W + ΔW)(1 + 0.5·(g − 1))."""
    whole = wide(W) + adapter.scaling * (wide(adapter.B) @ wide(adapter.A))
    return (whole + effective(adapter, W)) / 2


WRONG: list[tuple[str, str, Any, float, str, str]] = [
    ("lora", "both factors", lambda a, W: wide(W) + delta(a, W) / 4, 0.5, "WRONG_STRENGTH", "once per factor"),
    ("duallora", "both factors", lambda a, W: wide(W) + delta(a, W) / 4, 0.5, "WRONG_STRENGTH", "once per factor"),
    ("lora", "ignored", effective, 0.5, "WRONG_STRENGTH", "was ignored"),
    ("dora", "inside the norm", inside, 0.5, "STRENGTH_OF_A_PART", "before the norm"),
    ("dora", "the gain alone", gain_alone, 0.5, "STRENGTH_OF_A_PART", "gain alone"),
    ("dora", "AdapterHub", unscaled, 1.0, "WRONG_STRENGTH", "AdapterHub"),
    ("dora", "ComfyUI", stale_norm, 1.0, "MAGNITUDE_DROPPED", "ComfyUI"),
]


@pytest.mark.parametrize(("kind", "name", "f", "strength", "code", "says"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_merge_is_named(
    world: World, tmp_path: Path, kind: str, name: str, f: Any, strength: float, code: str, says: str
) -> None:
    found = audited(world, tmp_path / "out", kind, f, strength=strength)
    assert found.verdict == "fail"
    assert {module.code for module in found.modules.values()} == {code}
    assert all(says in module.message for module in found.modules.values())


@pytest.mark.parametrize("kind", ["lora", "dora", "d2lora", "duallora"])
@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_a_right_merge_at_a_strength_raises_no_alarm(world: World, tmp_path: Path, kind: str, strength: float) -> None:
    f = lambda a, W: wide(W) + strength * delta(a, W)  # noqa: E731
    for dtype in ("F32", "BF16"):
        assert audited(world, tmp_path / dtype, kind, f, strength=strength, dtype=dtype).verdict == "pass"


def operands(kind: str, axis: Any, dtype: torch.dtype) -> Operands:
    base = (0.05 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))).to(dtype)
    return Operands(base, make(kind, base.float(), axis).to(dtype=torch.float32), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kohyas_scripts_round_every_step_in_16_bits(dtype: torch.dtype) -> None:
    """Alpha is a tensor of the dtype of the merge, and so is what it gives divided by r."""
    it = operands("lora", "out_features", dtype)
    lora = it.adapter
    assert isinstance(lora, LoRA)
    product = (lora.B.to(dtype).double() @ lora.A.to(dtype).double()).float().to(dtype)
    scaling = float(torch.tensor(float(lora.scaling) * 3, dtype=dtype) / 3)
    wanted = (it.base.float() + (product.float() * scaling).to(dtype).float()).to(dtype)
    assert scaling != lora.scaling
    off = (BY_NAME["kohya"].merge(it) != wanted).double().mean()
    assert float(off) < 0.01  # where the product lies halfway


@pytest.mark.parametrize("axis", ["out_features", "in_features"])
def test_lycoris_adds_an_epsilon_to_the_norm(axis: Any) -> None:
    """In float32; ComfyUI's along in_features is the same."""
    it = operands("dora", axis, torch.float32)
    dora = it.adapter
    assert isinstance(dora, DoRA)
    whole = it.base.double() + dora.scaling * dora.B.double() @ dora.A.double()
    norm = whole.norm(dim=1 if axis == "out_features" else 0, keepdim=True) + 2.0**-23
    wanted = whole * (dora.magnitude.double().view_as(norm) / norm)
    made = BY_NAME["lycoris-dora"].merge(it)
    assert float((made.double() - wanted).abs().max()) <= 4 * 2.0**-24 * float(wanted.abs().max())
