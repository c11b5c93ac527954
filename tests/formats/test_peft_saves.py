"""Adapters written by PEFT itself, on tiny transformers models made from configs, read as PEFT reads them."""

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from d2surgery.checkpoint import Checkpoint
from d2surgery.formats import open_layout
from d2surgery.formats.layout import AdapterLayout, Layout
from d2surgery.formats.peft.writer import tensors_of

transformers.logging.set_verbosity_error()
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
LLAMA = {**TINY, "num_key_value_heads": 1}
MOE = {**LLAMA, "num_hidden_layers": 1}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **more))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    )


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    return transformers.ConvNextForImageClassification(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=8, head_dim=8, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> Any:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**MOE, num_local_experts=4, head_dim=8))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        yield


def saved(directory: Path, model: Any, **config: Any) -> tuple[Layout, Any]:
    """Our layout of what PEFT saved, and PEFT's model as PEFT loads it again."""
    torch.manual_seed(0)
    model.save_pretrained(directory / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(directory / "adapter")
    again = type(model).from_pretrained(directory / "base")
    return open_layout(directory / "adapter"), peft.PeftModel.from_pretrained(again, directory / "adapter")


def tuner_layers(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers by our module name: of the module, or of the parameter that a wrapper holds."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            parameter = getattr(layer, "parameter_name", None)
            plain = name.replace(".base_layer", "")
            found[f"{plain}.{parameter}" if parameter else plain] = layer
    return found


def assert_same_as_peft(layout: Layout, model: Any) -> None:
    """The same modules, ranks and scalings as PEFT has after loading; nothing unread, nothing wrong."""
    layers = tuner_layers(model)
    assert [str(problem) for problem in layout.problems if problem.severity == "error"] == []
    assert set(layout.adapters) == set(layers)
    for module, layer in layers.items():
        ours = layout.adapters[module]
        assert ours.rank == layer.r["default"], module
        assert ours.scaling == layer.scaling["default"], module
    assert sorted(layout.accounted()) == sorted(layout.header.tensors)
    assert not layout.unread
    written, read = dict(tensors_of(Checkpoint(layout))), layout.header.tensors
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {k: info.shape for k, info in read.items()}


def shape_of(adapter: AdapterLayout) -> tuple[str, str, int, int]:
    return adapter.kind, adapter.stored, adapter.out_features, adapter.in_features


# Ranks and scalings ---------------------------------------------------------------------------------------------------

RANKS: list[dict[str, int]] = [{}, {"q_proj": 3}, {"q_proj": 3, "layers.0.self_attn.q_proj": 5}, {r".*\.1\..*_proj": 6}]
ALPHAS: list[dict[str, int]] = [
    {},
    {"q_proj": 7},
    {"layers.0.self_attn.q_proj": 9, "q_proj": 7},
    {"layers.[01].mlp.*": 11},
]


@pytest.mark.parametrize(("ranks", "alphas", "rslora"), list(itertools.product(RANKS, ALPHAS, [False, True])))
def test_ranks_and_scalings_are_pefts_after_a_reload(
    tmp_path: Path, ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    """PEFT sorts the patterns when it saves: ranks that this changes do not load, so they are told, not compared."""
    config = {"r": 2, "lora_alpha": 5, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    reordered = list(ranks) != sorted(ranks)
    if reordered:
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], **config))
        wrapped.save_pretrained(tmp_path / "adapter")
        layout = open_layout(tmp_path / "adapter")
        codes = [(p.code, p.module) for p in layout.problems if p.code == "RANK_DISAGREES"]
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
        assert codes
        return
    layout, model = saved(tmp_path, llama(), target_modules=["q_proj", "up_proj"], **config)
    assert_same_as_peft(layout, model)


def test_an_alpha_pattern_that_saving_reorders_is_ambiguous_and_read_as_peft_reloads_it(tmp_path: Path) -> None:
    alphas = {"q_proj": 32, "layers.0.self_attn.q_proj": 8}
    layout, model = saved(tmp_path, llama(), target_modules=["q_proj"], r=4, alpha_pattern=alphas)
    assert_same_as_peft(layout, model)
    assert layout.adapters["model.layers.0.self_attn.q_proj"].scaling == 2.0  # 8.0 before it was saved
    assert {(p.code, p.module) for p in layout.problems} == {("AMBIGUOUS_PATTERN", "model.layers.0.self_attn.q_proj")}


# Which modules --------------------------------------------------------------------------------------------------------

TARGETS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": r".*\.layers\.[0]\..*_proj"},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*k_proj"},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
    {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4},
]


@pytest.mark.parametrize("config", TARGETS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_choice_of_modules_is_read_as_peft_loads_it(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    layout, model = saved(tmp_path, llama(tie_word_embeddings=tied), **{"r": 2, **config})
    assert_same_as_peft(layout, model)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_weight_tying_adds_a_module_that_the_config_does_not_name(tmp_path: Path, targets: list[str]) -> None:
    model = llama(tie_word_embeddings=True)
    layout, _ = saved(tmp_path, model, target_modules=targets, r=2, ensure_weight_tying=True)
    assert [p.code for p in layout.problems if p.severity == "error"] == []
    assert "model.embed_tokens" in layout.adapters


# Shapes and kinds -----------------------------------------------------------------------------------------------------


def test_embeddings_lie_the_other_way_round(tmp_path: Path) -> None:
    layout, _ = saved(tmp_path, llama(), target_modules=["embed_tokens", "q_proj", "k_proj"], r=2, use_dora=True)
    assert shape_of(layout.adapters["model.embed_tokens"]) == ("dora", "embedding", 16, 32)
    assert shape_of(layout.adapters["model.layers.0.self_attn.k_proj"]) == ("dora", "linear", 8, 16)


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_of_gpt2_gives_out_and_in_as_the_layer_computes(tmp_path: Path, dora: bool) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    layout, model = saved(tmp_path, gpt2(), target_modules=targets, r=2, fan_in_fan_out=True, use_dora=dora)
    assert_same_as_peft(layout, model)
    assert shape_of(layout.adapters["transformer.h.0.attn.c_attn"])[1:] == ("linear", 48, 16)
    assert layout.kinds == ["dora" if dora else "lora"]


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_flatten_their_kernel_into_in(tmp_path: Path, dora: bool) -> None:
    targets = ["patch_embeddings", "downsampling_layer.1", "pwconv1"]
    layout, model = saved(tmp_path, convnext(), target_modules=targets, r=2, use_dora=dora)
    assert_same_as_peft(layout, model)
    kind = "dora" if dora else "lora"
    assert shape_of(layout.adapters["convnext.embeddings.patch_embeddings"]) == (kind, "conv", 8, 3 * 4 * 4)
    linear = [a for a in layout.adapters.values() if a.module.endswith("pwconv1")]
    assert {a.stored for a in linear} == {"linear"}


# Everything that is not a factor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_the_bases(tmp_path: Path, bias: str) -> None:
    layout, model = saved(tmp_path, bert(), target_modules=["query"], r=2, bias=bias)
    assert_same_as_peft(layout, model)
    targeted = {f"{module}.bias" for module in layout.adapters}
    every = {name for name, _ in bert().named_parameters() if name.endswith(".bias")}
    assert set(layout.replacements) == (every if bias == "all" else targeted)


def test_biases_lost_by_older_peft_are_reported(tmp_path: Path) -> None:
    saved(tmp_path, bert(), target_modules=["query"], r=2, bias="lora_only")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith(".bias")}, path)
    assert [problem.code for problem in open_layout(path).problems] == ["BIAS_NOT_SAVED"]


def test_the_added_bias_is_a_slot_and_the_replaced_one_a_replacement(tmp_path: Path) -> None:
    layout, model = saved(tmp_path, bert(), target_modules=["query"], r=2, lora_bias=True, bias="all")
    assert_same_as_peft(layout, model)
    assert {tuple(adapter.slots) for adapter in layout.adapters.values()} == {("A", "B", "bias")}


def test_saved_modules_are_replacements_with_the_values_peft_would_use(tmp_path: Path) -> None:
    layout, model = saved(tmp_path, bert(), target_modules=["query"], r=2, task_type="SEQ_CLS")
    assert_same_as_peft(layout, model)
    assert set(layout.replacements) == {"classifier.weight", "classifier.bias"}
    assert layout.problems == ()
    stored = load_file(layout.path)[layout.replacements["classifier.weight"]]
    used = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(stored, used)


def test_token_rows_keep_their_indices_in_order(tmp_path: Path) -> None:
    layout, _ = saved(tmp_path, llama(), target_modules=["q_proj"], r=2, trainable_token_indices=[7, 3])
    (rows,) = layout.rows.values()
    assert list(layout.rows) == ["model.embed_tokens.weight"]
    assert sorted(rows.indices) == [3, 7]
    assert (
        list(rows.indices)
        == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    )


def test_a_full_embedding_saved_alongside_is_a_replacement(tmp_path: Path) -> None:
    model = llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    layout = open_layout(tmp_path / "adapter")
    assert set(layout.replacements) >= {"model.embed_tokens.weight"}
    assert layout.adapters["model.embed_tokens"].stored == "embedding"
    assert not layout.unread


# Experts --------------------------------------------------------------------------------------------------------------

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MOES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("model", MOES.values(), ids=MOES)
@pytest.mark.parametrize("targets", [BOTH, BOTH[::-1], BOTH[:1], BOTH[1:]], ids=str)
@pytest.mark.parametrize("ranks", [{}, {"experts.down_proj": 3}, {"gate_up_proj": 5}], ids=str)
def test_expert_parameters_are_told_apart_as_peft_nests_them(
    tmp_path: Path, model: Any, targets: list[str], ranks: dict[str, int]
) -> None:
    config = {"target_modules": ["q_proj"], "target_parameters": targets, "r": 2, "rank_pattern": ranks}
    layout, loaded = saved(tmp_path, model(), **config)
    assert_same_as_peft(layout, loaded)
    for module, layer in tuner_layers(loaded).items():
        if ".experts." not in module:
            continue
        ours = layout.adapters[module]
        assert (ours.stored, ours.experts) == ("experts", 4)
        stored = load_file(layout.path)
        assert torch.equal(stored[ours.keys["A"]], layer.lora_A["default"].weight)
        assert torch.equal(stored[ours.keys["B"]], layer.lora_B["default"].weight)
        assert ours.in_features * ours.out_features == layer.get_param()[0].numel()


def test_a_matrix_parameter_is_named_with_its_parameter(tmp_path: Path) -> None:
    layout, loaded = saved(tmp_path, qwen3_moe(), target_modules=[], target_parameters=["gate.weight"], r=2)
    assert_same_as_peft(layout, loaded)
    (found,) = layout.adapters.values()
    assert (found.module, found.experts) == ("model.layers.0.mlp.gate.weight", 1)


def test_a_bare_parameter_name_reaches_every_module_that_has_it(tmp_path: Path) -> None:
    layout, loaded = saved(tmp_path, mixtral(), target_modules=["q_proj"], target_parameters=["down_proj"], r=2)
    assert_same_as_peft(layout, loaded)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_multihead_attention_is_refused_by_name(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = torch.nn.MultiheadAttention(8, 2)

    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["mha"], r=2))
    wrapped.save_pretrained(tmp_path)
    problems = open_layout(tmp_path).problems
    assert "UNSUPPORTED_VARIANT" in {problem.code for problem in problems}
    assert any("MultiheadAttention" in problem.message for problem in problems)


METHODS = {
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "HIRA": lambda: peft.HiraConfig(target_modules=["q_proj"]),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_saved_by_peft_are_refused_by_name_and_without_config_never_read_as_lora(
    tmp_path: Path, method: str
) -> None:
    peft.get_peft_model(llama(), METHODS[method]()).save_pretrained(tmp_path)
    (problem,) = open_layout(tmp_path).problems
    assert (problem.code, method in problem.message) == ("UNSUPPORTED_METHOD", True)
    (tmp_path / "adapter_config.json").unlink()
    layout = open_layout(tmp_path)
    assert {problem.severity for problem in layout.problems} == {"error"}
    assert set(layout.unread) or "MISSING_CONFIG" in {problem.code for problem in layout.problems}
    if method == "ADALORA":  # shares lora_A and lora_B
        assert "UNKNOWN_TENSOR" in {problem.code for problem in layout.problems}


VARIANTS = [  # (config, code)
    ({"alora_invocation_tokens": [1, 2]}, "UNSUPPORTED_VARIANT"),
    ({"use_bdlora": peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}, "UNSUPPORTED_VARIANT"),
    ({"init_lora_weights": "pissa"}, "MUTATED_BASE"),
    ({"init_lora_weights": "olora"}, "MUTATED_BASE"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "LAYER_REPLICATION"),
]


@pytest.mark.parametrize(("config", "code"), VARIANTS, ids=str)
def test_variants_saved_by_peft_are_refused_by_name(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2, **config)).save_pretrained(tmp_path)
    assert code in {problem.code for problem in open_layout(tmp_path).problems if problem.severity == "error"}


def test_pickled_by_peft_reads_the_same(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, use_dora=True)
    )
    wrapped.save_pretrained(tmp_path / "st")
    wrapped.save_pretrained(tmp_path / "bin", safe_serialization=False)
    one, other = open_layout(tmp_path / "st"), open_layout(tmp_path / "bin")
    assert other.path.suffix == ".bin"
    assert (one.adapters, one.replacements, one.problems) == (other.adapters, other.replacements, other.problems)
