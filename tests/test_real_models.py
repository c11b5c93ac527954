"""Real base models and a real adapter: merged float32 logits against the unmerged forward.

Needs a directory with SmolLM2-135M-Instruct and gemma-3-270m (D2SURGERY_MODELS) and, for gemma, the adapter
gemma270m-aowei (D2SURGERY_ADAPTERS); skipped without them. LoRA's oracle is PEFT's unmerged forward in float32; for
the kinds that PEFT lacks, and for DoRA, it is a float64 forward with the dense formula written here.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2surgery import KINDS, from_adapters, merge, save

MODELS = Path(os.environ.get("D2SURGERY_MODELS", "absent"))
ADAPTERS = Path(os.environ.get("D2SURGERY_ADAPTERS", "absent"))
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: does ethanol take more energy to make than it produces? Answer:",
)


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"no {path.name}: set D2SURGERY_MODELS and D2SURGERY_ADAPTERS")


def logits(model: Any, directory: Path) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return [model(**tokenizer(prompt, return_tensors="pt")).logits.double() for prompt in PROMPTS]


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@needs(MODELS / "gemma-3-270m")
@needs(ADAPTERS / "gemma270m-aowei")
def test_a_real_adapter_on_gemma_gives_pefts_unmerged_logits(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = MODELS / "gemma-3-270m", ADAPTERS / "gemma270m-aowei"
    merge(base, adapter, tmp_path / "merged", dtype="F32")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain, base)
    wanted = logits(PeftModel.from_pretrained(plain, str(adapter)), base)
    assert relative(before, wanted) > 1e-2  # the adapter does something
    assert relative(merged, wanted) < 1e-5


def dense_lora(w: Tensor, s: float, t: dict[str, Tensor]) -> Tensor:
    return w + s * t["B"] @ t["A"]


def dense_dora(w: Tensor, s: float, t: dict[str, Tensor]) -> Tensor:
    v = w + s * t["B"] @ t["A"]
    return t["magnitude"][:, None] * v / v.square().sum(1, keepdim=True).sqrt()


def dense_duallora(w: Tensor, s: float, t: dict[str, Tensor]) -> Tensor:
    z = t["D"] @ t["C"]
    return w + s * (t["B"] @ t["A"]).clamp(min=0) * torch.where(z > 0, 1.0, -1.0).double()


def dense_d2lora(w: Tensor, s: float, t: dict[str, Tensor]) -> Tensor:
    update = s * (t["B_plus"] @ t["A_plus"] - 0.5 * t["B_minus"] @ t["A_minus"])
    norms = w.square().sum(0).sqrt() / (w + update).square().sum(0).sqrt()
    return (w + update) * norms + update


DENSE: dict[str, Callable[[Tensor, float, dict[str, Tensor]], Tensor]] = {
    "lora": dense_lora,
    "dora": dense_dora,
    "duallora": dense_duallora,
    "d2lora": dense_d2lora,
}


@needs(MODELS / "SmolLM2-135M-Instruct")
@pytest.mark.parametrize("kind", DENSE)
def test_every_kind_on_smollm2_gives_the_logits_of_a_float64_forward(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = MODELS / "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = logits(model, base)
    generator = torch.Generator().manual_seed(1)
    adapters = {}
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            weight = linear.weight.data
            slots = KINDS[kind].init(weight.float(), rank=8, scaling=2.0, generator=generator).slots()
            moved = {
                slot: t * (1 + 0.01 * torch.randn(t.shape, generator=generator)) if slot == "magnitude"
                else t if t.any() else 0.02 * torch.randn(t.shape, generator=generator)
                for slot, t in slots.items()
            }  # fmt: skip
            adapters[name] = KINDS[kind](scaling=2.0, **moved)
            linear.weight.data = DENSE[kind](weight, 2.0, {slot: t.double() for slot, t in moved.items()})
    wanted = logits(model, base)
    save(from_adapters(adapters), tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="F32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert relative(before, wanted) > 1e-2
    assert relative(logits(merged, base), wanted) < 1e-5
