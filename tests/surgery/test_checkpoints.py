"""Surgery on whole files: PEFT loads what comes of it, and its unmerged forward is the oracle."""

import json
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from models import SIZES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from d2surgery import BaseWeights, from_adapters, load, merge, save
from d2surgery.adapters import Adapter, D2LoRA, LoRA
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError
from d2surgery.surgery.algebra import choose, combine, scale
from d2surgery.surgery.choices import Keep, Recipe
from d2surgery.surgery.extracting import extract
from d2surgery.surgery.rescaling import rescale
from d2surgery.surgery.resizing import against_base, budget, convert, resize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
IDS = torch.tensor([[1, 5, 9, 30, 2]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and PEFT's own adapters of it: lora, another, dora, each trained in name."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    for seed, (name, options) in enumerate({"lora": {}, "another": {}, "dora": {"use_dora": True}}.items()):
        torch.manual_seed(seed)
        base = T.LlamaForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **options))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.05)
            if "magnitude" in key:
                parameter.data *= 1 + 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def logits(base: Path, adapter: Path | None = None) -> Tensor:
    model: Any = T.LlamaForCausalLM.from_pretrained(base)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns of missing and unexpected keys
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> bool:
    return float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def deltas(checkpoint: Checkpoint, base: BaseWeights) -> dict[str, Any]:
    return {m: a.delta(base[f"{m}.weight"].double()).numpy() for m, a in checkpoint.items()}


def test_lora_as_dora_is_the_same_model_to_peft(world: Path, tmp_path: Path) -> None:
    made, certificate = convert(load(world / "lora"), "dora", BaseWeights(world / "base"))
    save(made, tmp_path / "dora")
    assert certificate.exact
    assert close(logits(world / "base", tmp_path / "dora"), logits(world / "base", world / "lora"))


def test_dora_as_lora_has_the_error_that_it_states(world: Path, tmp_path: Path) -> None:
    base, dora = BaseWeights(world / "base"), load(world / "dora")
    made, certificate = convert(dora, "lora", base, keep=Keep(rank=6))
    save(made, tmp_path / "lora")
    wanted, got = deltas(dora, base), deltas(load(tmp_path / "lora"), base)
    for module, loss in certificate.losses.items():
        error = np.linalg.norm(got[module] - wanted[module]) / np.linalg.norm(wanted[module])
        assert loss.relative_error == pytest.approx(error, rel=1e-5)
        assert loss.rank == 6
    assert logits(world / "base", tmp_path / "lora").isfinite().all()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["use_dora"] is False
    (step,) = load(tmp_path / "lora").layout.about.history
    files = (world / "dora" / "adapter_model.safetensors", world / "base" / "model.safetensors")
    assert [entry["sha256"] for entry in step["inputs"]] == [sha256(file.read_bytes()).hexdigest() for file in files]
    assert [entry["what"] for entry in step["inputs"]] == ["adapter", "base"]


def test_a_base_is_named_where_it_decided_something(world: Path) -> None:
    """Ranks of a LoRA need none, unless they were chosen by it."""
    lora, base = load(world / "lora"), BaseWeights(world / "base")
    for keep, whats in ((against_base(lora, 0.01, base), ["adapter", "base"]), (Keep(rank=2), ["adapter"])):
        (step,) = resize(lora, base, keep=keep)[0].layout.about.history
        assert [entry["what"] for entry in step["inputs"]] == whats


def test_dora_as_lora_is_exact_on_a_rescaled_base(world: Path, tmp_path: Path) -> None:
    made, certificate = rescale(load(world / "dora"), BaseWeights(world / "base"), tmp_path / "base")
    save(made, tmp_path / "lora")
    assert certificate.max_relative_error < 1e-5
    assert close(logits(tmp_path / "base", tmp_path / "lora"), logits(world / "base", world / "dora"))


def test_ranks_that_differ_are_read_back_by_peft(world: Path, tmp_path: Path) -> None:
    made, certificate = convert(load(world / "lora"), keep=Keep(by="energy", value=0.8))
    save(made, tmp_path / "small")
    again = load(tmp_path / "small")
    assert len({entry.ranks["update"] for entry in again.layout.adapters.values()}) > 1
    assert not again.layout.problems
    merged = tmp_path / "merged"
    merge(world / "base", tmp_path / "small", merged)
    assert close(logits(world / "base", tmp_path / "small"), logits(merged))
    assert all(loss.energy_kept >= 0.8 for loss in certificate.losses.values())


def test_an_error_that_cannot_be_kept_names_every_module(world: Path) -> None:
    with pytest.raises(D2SurgeryError) as error:
        convert(load(world / "dora"), "lora", BaseWeights(world / "base"), keep=Keep(rank=1), max_error=0.01)
    problems = error.value.problems
    assert {problem.code for problem in problems} == {"ERROR_TOO_LARGE"}
    assert len(problems) == len(load(world / "dora"))
    assert all("would do" in problem.message for problem in problems)
    _, certificate = convert(load(world / "dora"), "lora", BaseWeights(world / "base"), max_error=0.1)
    assert certificate.max_relative_error <= 0.1


def test_a_budget_goes_where_it_helps_most(world: Path) -> None:
    lora = load(world / "lora")
    sizes = {m: e.out_features + e.in_features for m, e in lora.layout.adapters.items()}
    whole = 4 * sum(sizes.values())
    ranks = {name: keep.rank or 0 for name, keep in budget(lora, whole // 2).items()}
    assert sum(ranks[m] * sizes[m] for m in sizes) <= whole // 2
    error = sum(float(a.update().singular_values()[ranks[m] :].square().sum()) for m, a in lora.items())
    even = sum(float(a.update().singular_values()[2:].square().sum()) for a in lora.values())
    assert error <= even
    with pytest.raises(D2SurgeryError, match=r"at least \d+ parameters") as problem:
        budget(lora, 10)
    assert [p.code for p in problem.value.problems] == ["BUDGET"]


def test_the_mean_of_adapters_is_their_mean(world: Path, tmp_path: Path) -> None:
    base = BaseWeights(world / "base")
    parts = [load(world / name) for name in ("lora", "another")]
    made, certificate = combine(parts, [0.5, 0.5])
    save(made, tmp_path / "both")
    assert certificate.exact
    one, other, both = (deltas(each, base) for each in (*parts, load(tmp_path / "both")))
    for module in both:
        assert np.linalg.norm(both[module] - (one[module] + other[module]) / 2) <= 1e-6 * np.linalg.norm(both[module])
    assert logits(world / "base", tmp_path / "both").isfinite().all()
    steps = load(tmp_path / "both").layout.about.history
    assert [entry["file"] for entry in steps[-1]["inputs"]] == ["adapter_model.safetensors"] * 2
    same, _ = combine([parts[0], parts[0]], [0.5, 0.5])
    assert {entry.ranks["update"] for entry in same.layout.adapters.values()} == {4}


def test_kinds_that_normalise_are_summed_as_deltas(world: Path) -> None:
    base = BaseWeights(world / "base")
    parts = [load(world / name) for name in ("lora", "dora")]
    made, certificate = combine(parts, [1.0, -0.5], Recipe(keep=Keep(by="energy", value=1.0)), base)
    one, other, both = (deltas(each, base) for each in (*parts, made))
    assert certificate.max_relative_error < 1e-6
    for module in both:
        wanted = one[module] - other[module] / 2
        assert np.linalg.norm(both[module] - wanted) <= 1e-5 * np.linalg.norm(wanted)
    with pytest.raises(D2SurgeryError, match="a base"):
        combine(parts, [1.0, 1.0])
    with pytest.raises(D2SurgeryError, match="of full rank"):
        combine(parts, [1.0, 1.0], base=base)
    made, certificate = combine(parts, [1.0, 1.0], Recipe(method="svd"), base)
    assert {entry.rank for entry in made.layout.adapters.values()} == {4 + 4}
    assert not certificate.exact


def normal(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def pair(out: int, in_: int, seed: int) -> LoRA:
    return LoRA(A=normal(2, in_, seed=seed), B=normal(out, 2, seed=seed + 1), scaling=0.5)


def test_what_is_not_a_factor_is_kept_or_named() -> None:
    def one(norm: float, out: int = 4) -> Checkpoint:
        made: Checkpoint = from_adapters({"q": pair(out, 6, 0)}, replacements={"norm.weight": torch.full((4,), norm)},
                             rows={"embed.weight": ([3], torch.ones(1, 4))}, biases={"q": torch.ones(out)})  # fmt: skip
        return made

    made, _ = combine([one(1.0), one(1.0)], [1.0, 1.0])
    assert torch.equal(made.tensor(made.layout.replacements["norm.weight"]), torch.ones(4))
    assert made.layout.rows["embed.weight"].indices == (3,)
    assert torch.allclose(made.bias("q"), torch.ones(4))  # 2 · 0.5 · 1, and its scaling is 1
    with pytest.raises(D2SurgeryError) as error:
        combine([one(1.0), one(2.0, 5)], [1.0, 1.0])
    assert {problem.code for problem in error.value.problems} == {"REPLACEMENTS_DISAGREE", "SHAPE_MISMATCH"}
    converted, _ = convert(one(1.0), "lora", keep=Keep(rank=1))
    assert torch.allclose(converted.bias("q") * float(converted["q"].scaling), torch.full((4,), 0.5))


FACTORS = (2.0, -1.0, 0.3)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["lora", "dora", "d2lora", "duallora"])
def test_a_factor_times_the_delta(world: Path, factor: float, name: str) -> None:
    base = BaseWeights(world / "base")
    module = "model.layers.0.self_attn.q_proj"
    if name in ("lora", "dora"):
        checkpoint = load(world / name)
    else:
        out, in_ = base[f"{module}.weight"].shape
        checkpoint, _ = convert(from_adapters({module: pair(out, in_, 1)}), name, base)
    made, certificate = scale(checkpoint, factor, base)
    assert certificate.exact
    wanted, got = deltas(checkpoint, base), deltas(made, base)
    for module in wanted:
        assert np.linalg.norm(got[module] - factor * wanted[module]) <= 2e-5 * np.linalg.norm(wanted[module])


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_is_refused(world: Path, factor: float) -> None:
    with pytest.raises(D2SurgeryError, match="a factor"):
        scale(load(world / "lora"), factor)


def test_a_part_of_an_adapter(world: Path) -> None:
    lora = load(world / "lora")
    chosen = choose(lora, "q_proj", range(1))
    assert [m for m, yes in chosen.items() if yes] == ["model.layers.0.self_attn.q_proj"]
    part, _ = scale(lora, 1.0, chosen=chosen, only=True)
    assert list(part) == ["model.layers.0.self_attn.q_proj"]
    whole, _ = scale(lora, 2.0, chosen=chosen)
    assert len(whole) == len(lora)
    assert float(whole["model.layers.0.self_attn.q_proj"].scaling) == 3.0
    with pytest.raises(D2SurgeryError, match="no module"):
        scale(lora, 1.0, chosen=choose(lora, "nothing", None), only=True)
    nothing, _ = scale(lora, 0.0)
    assert all(float(a.update().frobenius_norm()) == 0 for a in nothing.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_merge_is_unmerged(world: Path, tmp_path: Path, kind: Any, dtype: str) -> None:
    merge(world / "base", world / kind, tmp_path / "merged", dtype=dtype)
    made, certificate = extract(BaseWeights(world / "base"), BaseWeights(tmp_path / "merged"), kind, keep=Keep(rank=4))
    save(made, tmp_path / "out")
    assert set(made) == set(load(world / kind))
    assert not made.layout.replacements
    assert certificate.settings["left_out"] == {}
    merge(world / "base", tmp_path / "out", tmp_path / "again", dtype=dtype)
    if dtype == "F32":
        assert close(logits(tmp_path / "again"), logits(tmp_path / "merged"))
        assert close(logits(world / "base", tmp_path / "out"), logits(world / "base", world / kind))
        return
    merged, again = (BaseWeights(tmp_path / name) for name in ("merged", "again"))
    for module in made:
        name = f"{module}.weight"
        wanted = merged[name].double()
        away = (again[name].double() - wanted).norm() / wanted.norm()
        assert away < 2.0**-8  # no more than the rounding of bfloat16 itself


def test_ranks_stand_above_the_rounding_of_the_file(world: Path, tmp_path: Path) -> None:
    merge(world / "base", world / "lora", tmp_path / "merged", dtype="BF16")
    base = T.LlamaForCausalLM.from_pretrained(world / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", world / "lora", tmp_path / "tuned")
    made, _ = extract(BaseWeights(tmp_path / "base"), BaseWeights(tmp_path / "tuned"))
    assert {entry.ranks["update"] for entry in made.layout.adapters.values()} == {4}


def test_vectors_and_few_rows_are_stored_whole(world: Path, tmp_path: Path) -> None:
    model = T.LlamaForCausalLM.from_pretrained(world / "base")
    with torch.no_grad():
        model.model.norm.weight += 0.1
        model.model.embed_tokens.weight[3] += 1
        q = model.model.layers[0].self_attn.q_proj.weight
        q += 0.01 * torch.outer(*(torch.randn(n) for n in q.shape))
    model.save_pretrained(tmp_path / "tuned")
    made, _ = extract(BaseWeights(world / "base"), BaseWeights(tmp_path / "tuned"), keep=Keep(rank=1))
    save(made, tmp_path / "out")
    assert list(made) == ["model.layers.0.self_attn.q_proj"]
    assert list(made.layout.replacements) == ["model.norm.weight"]
    assert made.layout.rows["model.embed_tokens.weight"].indices == (3,)
    assert not load(tmp_path / "out").layout.problems
    assert close(logits(world / "base", tmp_path / "out"), logits(tmp_path / "tuned"))


def test_nothing_changed_is_an_error(world: Path) -> None:
    with pytest.raises(D2SurgeryError, match="nothing has changed"):
        extract(BaseWeights(world / "base"), BaseWeights(world / "base"))


def test_experts_keep_one_rank(tmp_path: Path) -> None:
    experts: Mapping[str, list[Adapter]] = {"mlp.experts.down_proj": [pair(8, 6, seed) for seed in range(3)]}
    experts["mlp.experts.down_proj"][1] = LoRA(A=torch.zeros(2, 6), B=torch.zeros(8, 2), scaling=0.5)
    made, _ = convert(from_adapters(experts), keep=Keep(by="energy", value=1.0))
    save(made, tmp_path / "a")
    again = load(tmp_path / "a")
    for expert, adapter in enumerate(experts["mlp.experts.down_proj"]):
        got = again.adapter("mlp.experts.down_proj", expert).update().dense()
        assert torch.allclose(got, adapter.update().dense(), atol=1e-6)  # type: ignore[union-attr]


def test_d2lora_is_kept_as_dora_on_its_axis_in_a_file(world: Path, tmp_path: Path) -> None:
    base, module = BaseWeights(world / "base"), "model.layers.0.self_attn.q_proj"
    out, in_ = base[f"{module}.weight"].shape
    start = from_adapters({module: D2LoRA(A_plus=normal(2, in_, seed=1), B_plus=0.01 * normal(out, 2, seed=2),
                                          A_minus=normal(2, in_, seed=3), B_minus=0.01 * normal(out, 2, seed=4),
                                          scaling=1.0)})  # fmt: skip
    dora, first = convert(start, "dora", base)
    save(dora, tmp_path / "dora")
    again = load(tmp_path / "dora")
    assert again[module].along == "in_features"
    back, second = convert(again, "d2lora", base, keep=Keep(rank=2))
    assert first.exact
    assert second.exact
    wanted, got = deltas(start, base)[module], deltas(back, base)[module]
    assert np.linalg.norm(got - wanted) <= 2e-5 * np.linalg.norm(wanted)
    merge(world / "base", tmp_path / "dora", tmp_path / "merged")
    merged = BaseWeights(tmp_path / "merged")[f"{module}.weight"].double() - base[f"{module}.weight"].double()
    assert np.linalg.norm(merged.numpy() - wanted) <= 1e-4 * np.linalg.norm(wanted)
