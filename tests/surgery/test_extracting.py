"""What lies between two models: experts, renamed parameters, new rows, noise; PEFT and our merge are the oracles."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from models import SIZES, gpt2
from peft import PeftModel
from torch import Tensor

from d2surgery import BaseWeights, Keep, extract, from_adapters, load, merge, save
from d2surgery.adapters import LoRA
from d2surgery.reporting.pages.parts import Figures
from d2surgery.reporting.pages.surgery import surgery_section
from d2surgery.surgery.fitting import dora_of
from d2surgery.surgery.provenance import losses_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
IDS = torch.tensor([[1, 5, 9, 30, 2]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def by_peft(base: Any, adapter: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and unexpected keys
        warnings.simplefilter("ignore", FutureWarning)
        return logits(PeftModel.from_pretrained(base, adapter))


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def thin(*shape: int, seed: int, rank: int = 2) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    *many, out, in_ = shape
    return 0.02 * torch.randn(*many, out, rank, generator=numbers) @ torch.randn(*many, rank, in_, generator=numbers)


def moe() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    torch.manual_seed(0)
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(
        **sizes, intermediate_size=24, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2, head_dim=8,
    ))  # fmt: skip


def test_experts_are_extracted_each_with_its_own_factors(tmp_path: Path) -> None:
    model = moe()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        experts.down_proj += thin(*experts.down_proj.shape, seed=1)
        experts.gate_up_proj += thin(*experts.gate_up_proj.shape, seed=2)
        model.model.layers[1].mlp.gate.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    made, certificate = extract(BaseWeights(tmp_path / "base"), BaseWeights(tmp_path / "tuned"), keep=Keep(rank=2))
    assert set(made) == {f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")}
    assert list(made.layout.replacements) == ["model.layers.1.mlp.gate.weight"]  # a router is no linear layer
    assert len(certificate.losses) == 2 * 3
    assert certificate.max_relative_error < 1e-5
    save(made, tmp_path / "out")
    merge(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    wanted, got = (dict(BaseWeights(tmp_path / name)) for name in ("tuned", "again"))
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)
    del made
    without = from_adapters(
        {m: [load(tmp_path / "out").adapter(m, e) for e in range(3)] for m in load(tmp_path / "out")}
    )
    save(without, tmp_path / "experts")  # PEFT's wrapper of a router is not what is tested here
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight -= 0.1
    base = T.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    assert close(by_peft(base, tmp_path / "experts"), logits(model))


def test_conv1d_is_extracted_the_right_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight
        weight += thin(*weight.shape, seed=1)
    model.save_pretrained(tmp_path / "tuned")
    made, certificate = extract(BaseWeights(tmp_path / "base"), BaseWeights(tmp_path / "tuned"))
    (module,) = made
    assert made[module].out_features == 3 * made[module].in_features
    assert certificate.losses[module].rank == 2  # what stands above float32's rounding
    save(made, tmp_path / "out")
    assert close(by_peft(T.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "out"), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_with_new_rows_are_stored_so_that_peft_reloads_them(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight += thin(*weight.shape, seed=1)
    model.resize_token_embeddings(35)
    model.save_pretrained(tmp_path / "tuned")
    made, _ = extract(BaseWeights(tmp_path / "base"), BaseWeights(tmp_path / "tuned"))
    save(made, tmp_path / "out")
    assert "model.embed_tokens.weight" in made.layout.replacements
    merge(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    assert close(logits(T.LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    base = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(35)
    assert close(by_peft(base, tmp_path / "out"), logits(model))


def test_a_base_that_was_rounded_later_is_seen(tmp_path: Path) -> None:
    """The tuned model in float32 was made of the unrounded base: the base's own rounding is no change."""
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 96}))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    whole = T.LlamaForCausalLM(T.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 96}))
    with torch.no_grad():
        weight = whole.model.layers[0].mlp.up_proj.weight
        weight += thin(*weight.shape, seed=1)
    whole.save_pretrained(tmp_path / "tuned")
    made, _ = extract(BaseWeights(tmp_path / "base"), BaseWeights(tmp_path / "tuned"))
    assert made.layout.adapters["model.layers.0.mlp.up_proj"].ranks["update"] == 2


def test_a_dora_is_found_through_the_rounding_of_the_file() -> None:
    """A change of a third of a unit in the last place: nearest to the file is far from what the file was made of."""
    numbers = torch.Generator().manual_seed(0)
    W = (0.02 * torch.randn(192, 128, generator=numbers)).bfloat16()
    update = thin(192, 128, seed=3, rank=2) * 5e-4
    V = W.double() + update
    lengths = W.double().norm(dim=1) * (1 + 2e-4 * torch.randn(192, generator=numbers))
    true = V / V.norm(dim=1, keepdim=True) * lengths[:, None]
    T_ = true.to(torch.float32).bfloat16()
    ulp = torch.exp2(torch.floor(torch.log2(T_.double().abs()))) * 2.0**-7
    errors = []
    for slack in (None, ulp / 2):
        W_new = W.double() + dora_of(W, T_, Keep(rank=2), "out_features", slack).delta(W.double())
        errors.append(float((W_new - true).norm() / (true - W.double()).norm()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "growth"), [(0.02, 0.01), (0.05, 0.0), (0.2, 0.05)])
def test_a_dora_has_the_rank_it_was_made_of(dtype: torch.dtype, size: float, growth: float) -> None:
    """The rank by the rounding of the file alone, whatever row is large or dead in the base; the update to within what
    that rounding leaves in a space of this rank."""
    numbers, (out, in_, rank) = torch.Generator().manual_seed(1), (160, 224, 6)
    W = 0.05 * torch.randn(out, in_, generator=numbers, dtype=torch.float64)
    W[5], W[9] = 20 * W[5], 0
    W = W.to(dtype).double()
    L = torch.randn(out, rank, generator=numbers).double() @ torch.randn(rank, in_, generator=numbers).double()
    L *= size * float(W.norm() / L.norm())
    V = W + L
    magnitude = V.norm(dim=1) * (1 + growth * torch.randn(out, generator=numbers).double())
    tuned = (V * (magnitude / V.norm(dim=1))[:, None]).to(dtype)
    slack = ulps(tuned) / 2 if dtype != torch.float32 else None
    noise = ulps(tuned).double() / 12**0.5
    edge = 1.1 * float(noise.square().sum(1).max().sqrt() + noise.square().sum(0).max().sqrt())
    found = dora_of(W, tuned.double(), Keep(by="above", value=edge), "out_features", slack)
    assert len(found.A) == rank
    rest = torch.arange(out) != 9  # of a dead row any length is as good
    left = (noise.square().sum() * rank * (out + in_) / (out * in_)).sqrt()
    assert float((found.B @ found.A - L)[rest].norm()) < 2 * float(left)
    missed = found.delta(W) + W - tuned.double()
    assert float(missed.norm()) < 1.1 * float(noise.norm())


def ulps(values: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(values.abs().double().clamp(min=1e-30)))) * torch.finfo(values.dtype).eps


def test_the_report_shows_what_a_file_says_of_itself_and_nothing_that_makes_no_sense() -> None:
    good = {"rank": 2, "norm": 1.0, "relative_error": 0.1, "spectral_error": 0.2, "curve": [1.0, 0.5, 0.1]}
    bad: dict[str, Any] = {
        "text": "x", "rank": good | {"rank": "2"}, "nan": good | {"norm": float("nan")}, "none": {}, "negative":
        good | {"relative_error": -1}, "big": good | {"norm": True},
    }  # fmt: skip
    assert losses_of({"modules": bad}) == {}
    assert losses_of({"modules": []}) == {}
    assert losses_of({"modules": {"a": good | {"curve": ["x"]}}})["a"].curve == ()
    step = {"method": "<b>", "inputs": [{"file": "<i>", "sha256": 5}, 3], "modules": {"layers.0.q": good}}
    page = "".join(surgery_section("<u>", [step], Figures()))
    assert "<u>" not in page.replace("<ul>", "")
    assert "&lt;b&gt;" in page
    assert np.isclose(losses_of(step)["layers.0.q"].energy_kept, 0.99)
    assert list(surgery_section("a", [], Figures())) == []


def test_a_zero_of_rank_zero_reads_back(tmp_path: Path) -> None:
    save(from_adapters({"q": LoRA(A=torch.zeros(1, 4), B=torch.zeros(3, 1), scaling=1.0)}), tmp_path / "a")
    assert not [problem for problem in load(tmp_path / "a").layout.problems if problem.severity == "error"]
