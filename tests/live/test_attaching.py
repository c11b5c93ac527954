"""Adapters in a live model: where they sit, what is trained, and that the saved adapter is exactly what was trained."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, gpt2, llama, t5
from torch import Tensor, nn

from d2surgery import KINDS, About, Adapter, load, merge, save
from d2surgery.errors import D2SurgeryError
from d2surgery.live.attaching import adapted, attach, detach, initial, set_warmup, snapshot
from d2surgery.live.layers import AdaptedLinear

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")]
every_kind = pytest.mark.parametrize("kind", KINDS)
ATTENTION = [f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qv"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def begin(
    model: nn.Module, kind: str, targets: str | Sequence[str] = ("q_proj", "v_proj"), **options: Any
) -> dict[str, Adapter]:
    """`initial` moved off its start, so that every slot matters."""
    generator = torch.Generator().manual_seed(7)
    start = initial(model, kind, targets, **{"rank": 4, "scaling": 1.5, "generator": generator, **options})
    return {name: moved(adapter, generator) for name, adapter in start.items()}


def moved(adapter: Adapter, generator: torch.Generator) -> Adapter:
    slots: dict[str, Any] = {
        name: slot + 0.1 * torch.randn(slot.shape, generator=generator).to(slot)
        for name, slot in adapter.slots().items()
    }
    return replace(adapter, **slots)


def attached(kind: str, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = llama() if model is None else model
    attach(model, begin(model, kind), **options)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def train(model: Any, steps: int = 3) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [llama, lambda: llama(tied=True), gpt2], ids=["llama", "tied", "gpt2"])
@every_kind
def test_the_saved_adapter_is_what_was_trained(tmp_path: Path, kind: str, base: Any) -> None:
    """Bit for bit after loading, and to 1e-5 of the largest logit after a float32 merge."""
    torch.manual_seed(0)
    model = base()
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "mlp.c_proj"] if base is gpt2 else ["q_proj", "down_proj", "lm_head"]
    attach(model, begin(model, kind, targets), dropout=0.1)
    train(model)
    live = logits(model)
    save(detach(model, About(base_model=str(tmp_path / "base"))), tmp_path / "adapter")
    again = type(model).from_pretrained(tmp_path / "base")
    before = logits(again)
    attach(again, load(tmp_path / "adapter"))
    assert torch.equal(logits(again), live)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = logits(type(model).from_pretrained(tmp_path / "merged"))
    assert float((merged - live).abs().max()) < 1e-5 * float(live.abs().max())
    assert float((before - live).abs().max()) > 1e-3 * float(live.abs().max()), "the adapter does nothing"


@every_kind
def test_a_layer_is_the_dense_layer_of_its_effective_weight(kind: str) -> None:
    model = attached(kind)
    dense = copy.deepcopy(model)
    for layer in adapted(dense).values():
        layer.weight.data += layer.adapter.delta(layer.base_weight).detach()
    detach(dense)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-6)


@every_kind
def test_detaching_gives_the_base_back(kind: str) -> None:
    torch.manual_seed(0)
    model = llama()
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, begin(model, kind))
    train(model)
    assert not torch.equal(logits(model), before)
    checkpoint = detach(model)
    assert list(checkpoint) == ATTENTION
    assert adapted(model) == {}
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_snapshot_is_a_copy_and_leaves_the_adapters_in() -> None:
    model = attached("lora")
    checkpoint = snapshot(model, About(task="CAUSAL_LM"))
    taken = checkpoint[ATTENTION[0]].slots()["A"].clone()
    train(model)
    assert torch.equal(checkpoint[ATTENTION[0]].slots()["A"], taken)
    assert not torch.equal(adapted(model)[ATTENTION[0]].adapter.slots()["A"], taken)
    assert checkpoint.layout.about.task == "CAUSAL_LM"


# ---- what is trained ------------------------------------------------------------------------------------------------


@every_kind
def test_slots_are_the_only_parameters_that_learn_and_stand_under_their_names(kind: str) -> None:
    model = attached(kind)
    wanted = {f"{module}.slots.{slot}" for module in ATTENTION for slot in KINDS[kind].dimensions}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert wanted <= set(model.state_dict())
    assert f"{ATTENTION[0]}.base_layer.weight" in model.state_dict()
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_slots_are_float32_on_sixteen_bit_bases(kind: str, dtype: torch.dtype) -> None:
    model = attached(kind, llama().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    assert {model(IDS).logits.dtype, adapted(model)[ATTENTION[0]].weight.dtype} == {dtype}


@every_kind
def test_autocast_trains_a_float32_base_in_bfloat16(kind: str) -> None:
    model = attached(kind)
    plain = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(IDS)
        torch.autograd.backward(mixed.logits.float().square().sum())
    assert float((mixed.logits.detach() - plain).abs().max()) < 0.05 * float(plain.abs().max())
    for parameter in model.parameters():
        assert (parameter.grad is not None and parameter.grad.dtype == torch.float32) == parameter.requires_grad


def test_an_adapter_that_is_not_trainable_keeps_its_dtype() -> None:
    model = llama()
    adapters = {name: adapter.to(dtype=torch.bfloat16) for name, adapter in begin(model, "lora").items()}
    attach(model, adapters, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert adapted(model)[ATTENTION[0]].adapter.slots()["A"].dtype == torch.bfloat16


@every_kind
def test_training_lowers_the_loss_and_repeats_under_a_seed(kind: str) -> None:
    one, two = train(attached(kind, dropout=0.1), 12), train(attached(kind, dropout=0.1), 12)
    assert one == two
    assert one[-1] < one[0]


@every_kind
def test_dropout_reaches_the_update_alone_and_only_in_training(kind: str) -> None:
    still, dropped = attached(kind), attached(kind, dropout=0.5)
    assert torch.equal(logits(still), logits(dropped))
    one, two = dropped.train()(IDS).logits, dropped(IDS).logits
    assert not torch.equal(one, two)
    layer = adapted(dropped)[ATTENTION[0]]
    silent = AdaptedLinear(layer.base_layer, initial(llama(), "lora", ["q_proj"], rank=2, scaling=1.0)[ATTENTION[0]])
    silent.dropout = 0.5
    x = torch.randn(5, 16)
    assert torch.equal(silent.train()(x), layer.base_layer(x)), "W0 sees the input as it is"


@every_kind
def test_warm_up_multiplies_the_scaling_and_is_folded_in_when_saved(kind: str) -> None:
    model = attached(kind)
    set_warmup(model, 0.25)
    layer = adapted(model)[ATTENTION[0]]
    assert layer.adapter.scaling == 1.5 / 4
    live = logits(model)
    again = llama()
    again.load_state_dict({name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}, strict=False)
    attach(again, snapshot(model))
    assert torch.equal(logits(again), live)
    set_warmup(model, 1.0)
    assert not torch.equal(logits(model), live)


def test_dual_lora_starts_as_the_base_when_its_warm_up_is_zero() -> None:
    torch.manual_seed(0)
    model = llama()
    before = logits(model)
    attach(model, initial(model, "duallora", "all-linear", rank=4, scaling=2.0))
    set_warmup(model, 0.0)
    assert torch.equal(logits(model), before)
    set_warmup(model, 1.0)
    assert not torch.equal(logits(model), before)


# ---- memory savers --------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_kind
def test_gradient_checkpointing_changes_no_gradient(kind: str, use_reentrant: bool) -> None:
    model = attached(kind)
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad)


COMPILING = """
import sys, torch
from live.test_attaching import IDS, attached, gradients, llama, set_warmup

for kind in sys.argv[1:]:
    model = attached(kind, llama(num_hidden_layers=1))
    wanted = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for w in (0.0, 0.3, 0.6, 1.0):  # the factor is no reason to compile for each value
        set_warmup(model, w)
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=w > 0.3):
            compiled(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    print(kind)
"""


@pytest.mark.long
@pytest.mark.parametrize("kinds", [["duallora"], ["lora", "dora", "d2lora"]])
def test_a_model_with_adapters_compiles_into_one_graph_and_warms_up_in_it(kinds: list[str]) -> None:
    """In its own process: the checks of test_adapters' import hook cannot be traced."""
    here = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", COMPILING, *kinds], cwd=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == kinds


# ---- targets --------------------------------------------------------------------------------------------------------


def places(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    return list(initial(model, "lora", targets, rank=2, scaling=1.0))


def test_targets_are_suffixes_a_regular_expression_or_all_linear() -> None:
    model = llama()
    assert places(model, ["q_proj", "v_proj"]) == ATTENTION
    assert places(model, ["layers.1.self_attn.q_proj", "lm_head"]) == [ATTENTION[2], "lm_head"]
    assert places(model, r".*layers\.0\.self_attn\.[qv]_proj") == ATTENTION[:2]
    every = places(model, "all-linear")
    assert len(every) == 14
    assert "lm_head" not in every
    assert len(places(gpt2(), "all-linear")) == 8
    assert "classifier" not in places(bert_classifier(), "all-linear")


def bert_classifier() -> Any:
    from transformers import BertForSequenceClassification

    return bert(BertForSequenceClassification)


WRONG_TARGETS: dict[str, tuple[str | list[str], list[str]]] = {
    "unknown": (["q_porj"], [r"q_porj matches nothing.*got q_proj, "]),
    "half a name": (["proj"], ["proj matches nothing"]),
    "two at once": (["q_proj", "query", "key"], ["query matches nothing", "key matches nothing"]),
    "an embedding": (["embed_tokens"], [r"not linear layers.*model\.embed_tokens \(Embedding\)"]),
    "blocks": (["mlp", "q_proj"], [r"layers\.0\.mlp \(LlamaMLP\), model\.layers\.1\.mlp"]),
    "a wide expression": (".*", [r"LlamaModel\).* and \d+ more"]),
    "nothing": ([], ["no targets"]),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_targets_that_do_not_fit_are_named_with_what_there_is(name: str) -> None:
    targets, messages = WRONG_TARGETS[name]
    with pytest.raises(D2SurgeryError) as raised:
        places(llama(), targets)
    assert {problem.code for problem in raised.value.problems} == {"TARGETS_UNMATCHED"}
    assert len(raised.value.problems) == len(messages)
    for message in messages:
        assert re.search(message, str(raised.value))


def test_every_layer_too_small_for_the_rank_is_named() -> None:
    with pytest.raises(D2SurgeryError) as raised:
        initial(llama(), "dora", ["q_proj", "k_proj", "v_proj"], rank=9, scaling=1.0)
    named = [problem.module for problem in raised.value.problems if problem.code == "RANK_TOO_HIGH"]
    assert named == [f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "kv"]


def test_options_are_those_of_the_kind() -> None:
    model = llama()
    d2 = initial(model, "d2lora", ["q_proj"], rank=2, scaling=1.0, tau=0.25, along="out_features", sigma=0.5)
    assert (d2[ATTENTION[0]].along, d2[ATTENTION[0]].tau) == ("out_features", 0.25)  # type: ignore[attr-defined]
    assert float(d2[ATTENTION[0]].slots()["A_minus"].std()) > 0.2
    assert initial(model, "dora", ["q_proj"], rank=2, scaling=1.0, along="in_features")[ATTENTION[0]].along
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG.*lora has no such option.*wanted none; got sigma, tau"):
        initial(model, "lora", ["q_proj"], rank=2, scaling=1.0, tau=0.5, sigma=0.1)
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG.*No such kind.*got 'vera'"):
        initial(model, "vera", ["q_proj"], rank=2, scaling=1.0)


@every_kind
def test_the_start_depends_on_the_generator_only(kind: str) -> None:
    model = llama()
    torch.manual_seed(3)
    one, two = (initial(model, kind, ["q_proj"], rank=2, scaling=1.0, generator=torch.Generator().manual_seed(5))
                for _ in "12")  # fmt: skip
    for name, adapter in one.items():
        assert all(torch.equal(slot, two[name].slots()[key]) for key, slot in adapter.slots().items())


# ---- where they sit -------------------------------------------------------------------------------------------------


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone() -> None:
    torch.manual_seed(0)
    model = llama(tied=True)
    embedded, head = model.model.embed_tokens(IDS), model.lm_head(torch.ones(16))
    attach(model, begin(model, "lora", ["lm_head"]))
    assert torch.equal(model.model.embed_tokens(IDS), embedded)
    assert not torch.equal(model.lm_head(torch.ones(16)), head)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_that_ask_a_layer_for_its_weight_still_run() -> None:
    model = t5()  # T5 compares wo.weight.dtype with its input's
    attach(model, begin(model, "lora", ["wo", "q"]))
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def test_a_layer_that_stands_in_two_places_is_exchanged_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.ModuleDict({"same": self.one, "other": nn.Linear(4, 4)})

    model = Twice()
    attach(model, begin(model, "lora", ["one"]))
    assert model.one is model.two["same"]
    assert isinstance(model.one, AdaptedLinear)
    detach(model)
    assert model.one is model.two["same"]
    assert isinstance(model.one, nn.Linear)


def test_the_output_projection_of_multihead_attention_is_not_a_linear_layer() -> None:
    """torch reads its weight past its forward: an adapter would do nothing."""
    with pytest.raises(D2SurgeryError, match="NonDynamicallyQuantizableLinear"):
        places(nn.TransformerEncoderLayer(8, 2), ["out_proj"])


def test_names_with_or_without_the_base_prefix_fit() -> None:
    from transformers import GPT2Model

    bare, head = gpt2(GPT2Model), gpt2()
    attach(head, begin(bare, "lora", ["c_attn"]))
    assert list(adapted(head)) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    attach(bare, snapshot(head))
    assert list(adapted(bare)) == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


def test_adapters_that_do_not_fit_the_model_are_all_named_and_nothing_is_changed() -> None:
    model = llama()
    good = begin(model, "lora", ["q_proj"])[ATTENTION[0]]
    adapters = {
        ATTENTION[0]: good,
        "model.layers.7.q_proj": good,
        "model.layers.0.mlp.up_proj": good,
        "model.norm": good,
    }
    with pytest.raises(D2SurgeryError) as raised:
        attach(model, adapters)
    found = {(problem.code, problem.module) for problem in raised.value.problems}
    assert found == {
        ("NO_SUCH_MODULE", "model.layers.7.q_proj"),
        ("SHAPE_MISMATCH", "model.layers.0.mlp.up_proj"),
        ("TARGETS_UNMATCHED", "model.norm"),
    }
    assert adapted(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_on_a_layer_is_refused() -> None:
    model = attached("lora")
    with pytest.raises(D2SurgeryError, match=r"not a linear layer.*AdaptedLinear"):
        attach(model, begin(llama(), "lora"))
    with pytest.raises(D2SurgeryError, match=r"TARGETS_UNMATCHED.*q_proj \(AdaptedLinear\)"):
        places(model, ["q_proj"])


@pytest.mark.parametrize(
    "name", ["llama embeddings", "llama saved modules", "llama tokens", "bert lora_bias", "mixtral down"]
)
def test_what_a_file_holds_beside_linear_layers_is_not_dropped(built: Any, name: str) -> None:
    case = built(name)
    with pytest.raises(D2SurgeryError, match="UNATTACHABLE"):
        attach(case.load(case.base), load(case.adapter))


def test_a_published_form_loads_into_a_live_model_as_peft_loads_it(built: Any) -> None:
    case = built("llama dora")
    model = case.load(case.base)
    attach(model, load(case.adapter), trainable=False)
    torch.testing.assert_close(case.forward(model), case.unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama dora"])
def test_losses_of_training_are_pefts(built: Any, name: str) -> None:
    """PEFT keeps the norm from the gradient too. Eight steps: AdamW makes rounding grow."""
    from peft import PeftModel

    case = built(name)
    ours, base = case.load(case.base), case.load(case.base)
    attach(ours, load(case.adapter))
    theirs = PeftModel.from_pretrained(base, case.adapter, is_trainable=True)
    assert train(ours, 8) == pytest.approx(wanted := train(theirs, 8), rel=3e-6)
    assert wanted[-1] < wanted[0] - 0.05


# ---- quantised bases ------------------------------------------------------------------------------------------------


def quantized(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    if bits == 4:
        small = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)
    else:
        small = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    small.load_state_dict(layer.state_dict())
    return nn.Sequential(small.to("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
@every_kind
def test_a_quantised_layer_is_the_dense_layer_of_its_dequantised_weight(kind: str, bits: int) -> None:
    model = quantized(bits)
    attach(model, begin(model, kind, ["0"]))
    (layer,) = adapted(model).values()
    x = torch.randn(5, 64)
    W0 = layer.base_weight
    wanted = torch.nn.functional.linear(x, W0 + layer.adapter.delta(W0), layer.bias)
    torch.testing.assert_close(model(x), wanted.to(x.dtype), rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(name.startswith("0.slots.") for name, p in model.named_parameters() if p.requires_grad)


def test_one_file_holds_one_kind(tmp_path: Path) -> None:
    model = llama()
    mixed = begin(model, "lora", ["q_proj"]) | begin(model, "dora", ["v_proj"])
    attach(model, mixed)
    with pytest.raises(D2SurgeryError, match="one file of PEFT's holds one kind"):
        save(snapshot(model), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- what does not depend on the input -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_what_is_kept_outside_training_is_what_the_forward_computes(kind: str, dtype: torch.dtype) -> None:
    """And is computed again when a slot, the warm-up, the base or its dtype changes."""
    model = attached(kind, llama().to(dtype)).eval()
    layer = adapted(model)[ATTENTION[0]]
    x = torch.randn(2, 3, 16, dtype=dtype)

    def scale_base() -> None:
        layer.weight.mul_(2)
        layer.remember_squares()

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: layer.slots[next(iter(layer.slots))].mul_(1.5),
        lambda: set_warmup(model, 0.5),
        scale_base,
        lambda: model.float().to(dtype),
    ]
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1.6e-2, 1e-3)
    for change in changes:
        with torch.no_grad():
            change()
            first, second = layer(x), layer(x)
        assert torch.equal(first, second)
        wanted = layer.adapter.forward(x, layer.base_weight, layer.bias)
        torch.testing.assert_close(first, wanted.detach(), rtol=rtol, atol=atol)


@every_kind
def test_decoding_computes_gains_and_weights_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(kind).eval()
    calls: list[Adapter] = []
    prepare = KINDS[kind].prepared

    def prepared(adapter: Adapter, *given: Any) -> Any:
        calls.append(adapter)
        return prepare(adapter, *given)

    monkeypatch.setattr(KINDS[kind], "prepared", prepared)
    with torch.no_grad():
        for _ in range(3):
            model(IDS)
        assert len(calls) == len(adapted(model))
        model.train()(IDS)
        assert len(calls) == len(adapted(model)), "training keeps nothing"
    model.eval()(IDS)
    assert len(calls) == len(adapted(model)), "with gradients nothing is kept"
    copied = copy.deepcopy(model)
    assert all(layer._prepared == {} for layer in adapted(copied).values())


def test_a_long_input_leaves_no_weight_of_dual_lora_behind() -> None:
    model = attached("duallora").eval()
    with torch.no_grad():
        model(torch.zeros(1, 65, dtype=torch.long))
        assert all(layer._prepared == {} for layer in adapted(model).values())
        model(torch.zeros(1, 64, dtype=torch.long))
        assert all(layer._prepared for layer in adapted(model).values())


def test_dual_lora_in_bfloat16_sees_updates_below_a_unit_of_the_base() -> None:
    """An update of 1e-4 of the base: a rounded W0 + delta keeps 8 % of it. What is kept is the slope of the outputs'
    (and the input gradients') change over that of the dense delta in float64; its standard error is 2 %."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    W0 = base.weight.detach()
    (start,) = initial(nn.Sequential(base), "duallora", ["0"], rank=4, scaling=1.0, sigma=0.02).values()
    adapter = replace(start, scaling=1e-4 * float(W0.float().norm() / start.delta(W0.float()).norm().detach()))
    x = torch.randn(4096, 64).to(torch.bfloat16).requires_grad_()
    g = torch.randn(4096, 64).to(torch.bfloat16)
    y, delta = AdaptedLinear(base, adapter).train()(x), adapter.delta(W0.double())
    (dx,) = torch.autograd.grad(y, x, g)
    for found, without, wanted in (
        (y.detach(), x.detach() @ W0.T, x.detach().double() @ delta.T),
        (dx, g @ W0, g.double() @ delta),
    ):
        kept = float(((found.double() - without.double()) * wanted).sum() / wanted.square().sum())
        assert kept == pytest.approx(1, abs=0.15)
