"""Where adapters land, from names and shapes alone: files saved by PEFT and transformers, and every misfit by hand."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from landing import Shapes, header, pair, place
from models import Built

import d2surgery.placement.sites
from d2surgery import formats
from d2surgery.files.checkpoints import read_checkpoint_header
from d2surgery.files.header import Header
from d2surgery.formats.layout import Layout
from d2surgery.placement.site import Site
from d2surgery.placement.sites import Landing, sites


class Lands(NamedTuple):
    """What a test expects of one tensor."""

    source: str | None
    transposed: bool | None = None  # None: not patched
    experts: tuple[tuple[int, tuple[int, int | None]], ...] = ()  # (expert, its rows of the adapter's output)
    replaced: bool = False


def names_only(layout: Layout | Header) -> Header:
    found = layout.header if isinstance(layout, Layout) else layout
    return header({n: i.shape for n, i in found.tensors.items()}, {n: i.dtype for n, i in found.tensors.items()})


def landing(case: Built, *, config: Mapping[str, Any] | None = None) -> Landing:
    base = names_only(read_checkpoint_header(case.base))
    layout = formats.layout(names_only(formats.open_layout(case.adapter)), case.config)
    return sites(layout, base, json.loads((case.base / "config.json").read_text()) if config is None else config)


def lands(site: Site) -> Lands:
    transposed = {patch.transposed for patch in site.patches}
    assert len(transposed) <= 1
    experts = tuple((patch.expert, patch.out) for patch in site.patches if patch.out != (0, None) or patch.expert)
    return Lands(site.source, transposed.pop() if transposed else None, experts, site.replacement is not None)


def linear(*names: str, transposed: bool = False) -> dict[str, Lands]:
    return {f"{name}.weight": Lands(f"{name}.weight", transposed) for name in names}


def layers(pattern: str, *modules: str, count: int = 2, transposed: bool = False) -> dict[str, Lands]:
    names = [f"{pattern.format(i)}{module}" for i in range(count) for module in modules]
    return linear(*names, transposed=transposed)


def experts(root: str, rows: Mapping[str, tuple[int, int]]) -> dict[str, Lands]:
    """Four experts in two layers, each tensor on disk with its rows of the fused parameter."""
    return {
        (name := f"{root.format(i)}.{e}.{part}.weight"): Lands(name, False, ((e, span),))
        for i in range(2)
        for e in range(4)
        for part, span in rows.items()
    }


def fused(name: str) -> dict[str, Lands]:
    stacked = tuple((e, (0, None)) for e in range(1, 4))
    return {(n := name.format(i)): Lands(n, True, stacked) for i in range(2)}


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA = layers("model.layers.{}.", *ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Q = layers("model.layers.{}.", "self_attn.q_proj")
BERT_DENSE = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
EMBED, WTE = "model.embed_tokens.weight", "transformer.wte.weight"
T5_Q = layers("encoder.block.{}.", "layer.0.SelfAttention.q") | layers(
    "decoder.block.{}.", "layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"
)
T5_WO = layers("encoder.block.{}.", "layer.1.DenseReluDense.wo") | layers(
    "decoder.block.{}.", "layer.2.DenseReluDense.wo"
)
COPY = Lands("shared.weight")
LANDINGS: dict[str, tuple[dict[str, Lands], bool]] = {  # case -> tensors of the merged checkpoint, whether untied
    "llama": (LLAMA, False),
    "llama all-linear": (LLAMA, False),
    "tied": (LLAMA, False),
    "tied tokens": (Q | {EMBED: Lands(EMBED)}, False),
    "tied embedding": (
        Q | {EMBED: Lands(EMBED, True, replaced=True), "lm_head.weight": Lands(EMBED, replaced=True)}, True,
    ),
    "tied saved head": (Q | {"lm_head.weight": Lands(EMBED, replaced=True)}, True),
    "tied saved embedding": (Q | {EMBED: Lands(EMBED, replaced=True), "lm_head.weight": Lands(EMBED)}, True),
    "gpt2": (
        layers("transformer.h.{}.", "attn.c_attn", "attn.c_proj", "mlp.c_proj", transposed=True)
        | {WTE: Lands(WTE, True), "lm_head.weight": Lands(WTE)}, True,
    ),
    "gpt2 square": (layers("transformer.h.{}.", "attn.c_proj", transposed=True), False),
    "gpt2 head on bare base": (layers("h.{}.", "attn.c_attn", "mlp.c_proj", transposed=True), False),
    "gpt2 bare on head base": (layers("transformer.h.{}.", "attn.c_attn", "mlp.c_proj", transposed=True), False),
    "gpt2 classifier": (
        layers("transformer.h.{}.", "attn.c_attn", transposed=True)
        | {"score.weight": Lands(None, replaced=True)}, False,
    ),
    "bert classifier": (
        layers("encoder.layer.{}.", *BERT_DENSE) | linear("pooler.dense")
        | {f"classifier.{leaf}": Lands(None, replaced=True) for leaf in ("weight", "bias")}, False,
    ),
    "bert bare on classifier base": (
        layers("bert.encoder.layer.{}.", "attention.self.query", "attention.self.value"), False,
    ),
    "t5": (
        T5_Q | T5_WO | {"shared.weight": Lands("shared.weight", True)}
        | {f"{n}.weight": COPY for n in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}, True,
    ),
    "mixtral": (
        Q | layers("model.layers.{}.", "block_sparse_moe.gate")
        | experts("model.layers.{}.block_sparse_moe.experts", {"w1": (0, 24), "w3": (24, 48), "w2": (0, 16)}), False,
    ),
    "mixtral down": (Q | experts("model.layers.{}.block_sparse_moe.experts", {"w2": (0, 16)}), False),
    "qwen3 moe": (
        Q | layers("model.layers.{}.", "mlp.gate")
        | experts("model.layers.{}.mlp.experts", {"gate_proj": (0, 8), "up_proj": (8, 16), "down_proj": (0, 16)}),
        False,
    ),
    "gpt-oss": (
        Q | fused("model.layers.{}.mlp.experts.gate_up_proj") | fused("model.layers.{}.mlp.experts.down_proj"), False,
    ),
    "gpt-oss square": (Q | fused("model.layers.{}.mlp.experts.down_proj"), False),
    "convnext": (
        layers("convnext.encoder.stages.{}.", "layers.0.pwconv1", count=4)
        | linear(*(f"convnext.encoder.stages.{i}.downsampling_layer.1" for i in range(1, 4)))
        | linear("convnext.embeddings.patch_embeddings"), False,
    ),
    "wav2vec2": (
        linear(
            "encoder.layers.0.attention.k_proj", "feature_projection.projection",
            "feature_extractor.conv_layers.1.conv",
        ), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LANDINGS)
def test_adapters_of_peft_land_on_the_tensors_of_transformers(built: Callable[[str], Built], name: str) -> None:
    found, (want, untied) = landing(built(name)), LANDINGS[name]
    assert {tensor: lands(site) for tensor, site in found.sites.items()} == want
    assert found.untied is untied
    assert [p.code for p in found.problems] == (["NEVER_CALLED"] if name == "t5" else [])


def test_ensured_ties_are_one_tensor_and_two_keys_that_must_agree(built: Callable[[str], Built]) -> None:
    found = landing(built("tied ensured"))
    assert {name: lands(site).transposed for name, site in found.sites.items()} == {EMBED: True}
    assert not found.untied
    root = "base_model.model."
    head, embed = f"{root}lm_head.lora_", f"{root}model.embed_tokens.lora_embedding_"
    assert {(f"{embed}A", f"{head}B.weight"), (f"{embed}B", f"{head}A.weight")} <= set(found.twins)


def test_token_rows_of_a_tied_embedding_keep_the_tie(built: Callable[[str], Built]) -> None:
    site = landing(built("tied tokens")).sites[EMBED]
    assert site.rows is not None
    assert site.rows.indices == (1, 3)


def test_lora_bias_lands_on_the_bias(built: Callable[[str], Built]) -> None:
    found = landing(built("bert lora_bias"))
    biases = {name: site.bias for name, site in found.sites.items() if name.endswith(".bias")}
    assert biases["encoder.layer.0.attention.self.query.bias"] == "encoder.layer.0.attention.self.query"
    assert set(biases) == {name.replace(".weight", ".bias") for name in found.sites if name.endswith(".weight")}


# Square weights -------------------------------------------------------------------------------------------------------

SQUARE = pair("h.0.attn.c_proj", 6, 6)
GPT2_BLOCK = {"h.0.attn.c_proj.weight": (6, 6), "h.0.attn.c_proj.bias": (6,)}


@pytest.mark.parametrize(
    ("neighbour", "bias", "config", "transposed"),
    [
        ((6, 18), (18,), {}, True),  # a Conv1D beside it
        ((18, 6), (18,), {}, False),  # a Linear beside it
        ((18, 6), (18,), {"model_type": "gpt2"}, False),  # what stands in the file goes before the name
        ((6, 6), (6,), {"model_type": "gpt2"}, True),  # nothing beside it tells
        ((6, 6), (6,), {"model_type": "llama"}, False),
        ((6, 6), (6,), {}, False),
    ],
)
def test_a_square_weight_lies_as_its_neighbours_or_as_its_family(
    neighbour: tuple[int, ...], bias: tuple[int, ...], config: dict[str, str], transposed: bool
) -> None:
    other = {"h.0.attn.c_attn.weight": neighbour, "h.0.attn.c_attn.bias": bias}
    found = place(SQUARE, GPT2_BLOCK | other, base_config=config)
    assert found.problems == ()
    assert found.sites["h.0.attn.c_proj.weight"].patches[0].transposed is transposed


@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("opt", False), ("gpt2", True)])
def test_the_kind_of_model_goes_before_what_the_adapters_config_says_of_it(family: str, transposed: bool) -> None:
    """PEFT warns of fan_in_fan_out on an nn.Linear and takes it for false."""
    config = {"fan_in_fan_out": True}
    found = place(pair("layers.0.q", 6, 6), {"layers.0.q.weight": (6, 6)}, config, {"model_type": family})
    assert (found.problems, found.sites["layers.0.q.weight"].patches[0].transposed) == ((), transposed)


def test_a_neighbour_in_another_block_says_nothing() -> None:
    other = {"h.1.attn.c_attn.weight": (6, 18), "h.1.attn.c_attn.bias": (18,)}
    assert place(SQUARE, GPT2_BLOCK | other).sites["h.0.attn.c_proj.weight"].patches[0].transposed is False


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "tensor"),
    [
        ("layers.0.q", "layers.0.q.weight"),
        ("model.layers.0.q", "layers.0.q.weight"),
        ("layers.0.q", "model.layers.0.q.weight"),
        ("bert.encoder.layer.0.dense", "encoder.layer.0.dense.weight"),
        ("model.layers.0.mlp.experts.1.w1", "model.layers.0.block_sparse_moe.experts.1.w1.weight"),
        ("layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_a_prefix_more_or_less_and_renamed_blocks_are_found(module: str, tensor: str) -> None:
    found = place(pair(module), {tensor: (4, 6)})
    assert found.problems == ()
    assert list(found.sites) == [tensor]


def test_the_exact_name_goes_before_a_prefixed_one() -> None:
    found = place(pair("layers.0.q"), {"layers.0.q.weight": (4, 6), "model.layers.0.q.weight": (4, 6)})
    assert (list(found.sites), found.problems) == (["layers.0.q.weight"], ())


# Misfits --------------------------------------------------------------------------------------------------------------

EXPERT = {
    "base_model.model.mlp.experts.lora_A.weight": (6, 6),  # three experts of rank two
    "base_model.model.mlp.experts.lora_B.weight": (4, 6),
}
DOWN = {"target_parameters": ["experts.down_proj"]}
ROWS = {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)}
EMBED_ROOT = "base_model.model.embed_tokens.lora_embedding_"
EMBEDDED = {f"{EMBED_ROOT}A": (2, 9), f"{EMBED_ROOT}B": (6, 2)}
BIASED = {**pair("q"), "base_model.model.q.lora_B.bias": (4,)}
CONV = {"base_model.model.c.lora_A.weight": (2, 6, 3), "base_model.model.c.lora_B.weight": (4, 2, 1)}
ENSURED = {"ensure_weight_tying": True}
TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}

# (adapter's shapes, base's shapes, adapter's config, base's config, code, part of the message)
MISFITS: list[tuple[Shapes, Shapes, dict[str, Any], dict[str, Any], str, str]] = [
    (pair("q"), {"k.weight": (4, 6)}, {}, {}, "NO_SUCH_MODULE", "q: not in the base"),
    (pair("l.0.q_proj"), {"l.0.q_prj.weight": (4, 6)}, {}, {}, "NO_SUCH_MODULE", "nearest: l.0.q_prj"),
    (EXPERT, {"other": (3, 4, 6)}, DOWN, {}, "NO_SUCH_MODULE", "mlp.experts.down_proj"),
    (ROWS, {"other.weight": (9, 6)}, {}, {}, "NO_SUCH_MODULE", "embed_tokens"),
    (BIASED, {"q.weight": (4, 6)}, {"lora_bias": True}, {}, "NO_SUCH_MODULE", "no bias"),
    (BIASED, {"q.weight": (4, 6), "q.bias": (5,)}, {"lora_bias": True}, {}, "SHAPE_MISMATCH", "bias"),
    (pair("q"), {"q.weight": (4, 7)}, {}, {}, "SHAPE_MISMATCH", "wanted (4, 7); got (out 4, in 6)"),
    (pair("q"), {"q.weight": (24,)}, {}, {}, "SHAPE_MISMATCH", "(24,)"),
    (pair("q"), {"q.weight": (4, 6, 1)}, {}, {}, "SHAPE_MISMATCH", "stored as linear"),
    (EMBEDDED, {"embed_tokens.weight": (6, 9)}, {}, {}, "SHAPE_MISMATCH", "stored as embedding"),
    (CONV, {"c.weight": (4, 6, 5)}, {}, {}, "SHAPE_MISMATCH", "stored as conv"),
    (CONV, {"c.weight": (4, 18)}, {}, {}, "SHAPE_MISMATCH", "stored as conv"),
    (CONV, {"c.weight": (4, 3, 3)}, {}, {}, "GROUPED_CONV", "c"),
    (EXPERT, {"mlp.experts.down_proj": (2, 4, 6)}, DOWN, {}, "SHAPE_MISMATCH", "experts"),
    (EXPERT, {f"mlp.experts.{e}.w2.weight": (4, 6) for e in range(2)}, DOWN, {}, "SHAPE_MISMATCH", "2 experts of 4"),
    (ROWS, {"embed_tokens.weight": (1, 6)}, {}, {}, "SHAPE_MISMATCH", "rows below 1"),
    (ROWS, {"embed_tokens.weight": (9, 5)}, {}, {}, "SHAPE_MISMATCH", "token rows"),
    ({"norm.weight": (5,)}, {"norm.weight": (6,)}, {"modules_to_save": ["norm"]}, {}, "SHAPE_MISMATCH", "replacement"),
    ({"lm_head.weight": (9, 5)}, {"lm_head.weight": (8, 6)}, {}, {}, "SHAPE_MISMATCH", "replacement"),
    (
        pair("model.layers.3.q"), {"model.language_model.layers.3.q.weight": (4, 6)}, {}, {}, "NAME_MATCHED",
        "model.…: 1 name: model.language_model.… in the base (got model.language_model.layers.3.q.weight)",
    ),
    (
        pair("layers.3.q"), {"model.text_model.layers.3.q.weight": (4, 6), "model.decoder.layers.3.q.weight": (4, 6)},
        {}, {}, "AMBIGUOUS_MODULE", "layers.3.q: fits several",
    ),
    (
        pair("model.language_model.layers.0.mlp.gate_proj"), {"model.llm.layers.0.mlp.w13_dn.weight": (8, 6)}, {},
        {"architectures": ["InklingForConditionalGeneration"]}, "STORED_OTHERWISE", "w13_dn.weight through Interleave",
    ),
    (
        EMBEDDED, {"embed_tokens.weight": (9, 6)}, {}, {"model_type": "muse_spark"}, "NORMED_EMBEDDING", "embed_tokens",
    ),
    (pair("q"), {"a.q.weight": (4, 6), "b.q.weight": (4, 6)}, {}, {}, "AMBIGUOUS_MODULE", "a.q.weight, b.q.weight"),
    ({**pair("q"), **pair("m.q")}, {"m.q.weight": (4, 6)}, {}, {}, "AMBIGUOUS_MODULE", "adapted twice"),
    ({"n.weight": (6,), "m.n.weight": (6,)}, {"m.n.weight": (6,)}, {}, {}, "AMBIGUOUS_MODULE", "replaced twice"),
    (
        {**ROWS, "base_model.model.m.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
        {"m.embed_tokens.weight": (9, 6)}, {}, {}, "AMBIGUOUS_MODULE", "rows are replaced twice",
    ),
    *(
        (
            {f"{one}.weight": (12, 6)}, {"embed_tokens.weight": (9, 6), "lm_head.weight": (9, 6)}, {}, {},
            "VOCABULARY_SPLIT", f"{other}.weight: not resized (wanted 12 tokens; got 9)",
        )
        for one, other in [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")]
    ),
    (SQUARE, GPT2_BLOCK, {"fan_in_fan_out": True}, {}, "AMBIGUOUS_ORIENTATION", "h.0.attn.c_proj"),
    (
        SQUARE, GPT2_BLOCK | {"h.0.a.weight": (6, 18), "h.0.a.bias": (18,), "h.0.b.weight": (9, 6), "h.0.b.bias": (9,)},
        {}, {}, "AMBIGUOUS_ORIENTATION", "h.0.attn.c_proj",
    ),
    (pair("q"), {"q.weight": (4, 6)}, {}, {"quantization_config": {"quant_method": "gptq"}}, "QUANTIZED_BASE", "gptq"),
    (
        EMBEDDED, {"embed_tokens.weight": (9, 6)}, {}, {"architectures": ["NovelForMaskedLM"]}, "UNKNOWN_TIE",
        "embed_tokens.weight",
    ),
    (
        EMBEDDED, {"embed_tokens.weight": (9, 6)}, {}, {"architectures": ["NovelLM"], "tie_word_embeddings": True},
        "UNKNOWN_TIE", "embed_tokens.weight",
    ),
    (
        EMBEDDED | pair("lm_head", 9, 6) | {"lm_head.weight": (9, 6)}, {"embed_tokens.weight": (9, 6)}, ENSURED, TIED,
        "TIE_BROKEN_BY_FILE", "lm_head",
    ),
    (
        {k.replace("embed_tokens", "shared"): v for k, v in EMBEDDED.items()}, {"shared.weight": (9, 6)}, {},
        {"architectures": ["T5ForConditionalGeneration"]}, "NEVER_CALLED", "shared",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "base", "config", "base_config", "code", "part"), MISFITS)
def test_a_misfit_is_named_and_nothing_else(
    shapes: Shapes, base: Shapes, config: dict[str, Any], base_config: dict[str, Any], code: str, part: str
) -> None:
    problems = place(shapes, base, config, base_config).problems
    assert [problem.code for problem in problems] == [code]
    assert part in str(problems[0])


def test_a_tensor_of_another_dtype_than_floats_is_quantised() -> None:
    problems = place(pair("q"), {"q.weight": (4, 6)}, **{"q.weight": "U8"}).problems
    assert [(p.code, p.module, p.got) for p in problems] == [("QUANTIZED_BASE", "q.weight", "U8")]


def test_every_code_of_sites_is_tested_here() -> None:
    folder = Path(d2surgery.placement.sites.__file__).parent
    sources = [path.read_text() for path in folder.glob("*.py") if path.name != "fit.py"]
    raised = {code for source in sources for code in re.findall(r'say\(\s*"([A-Z_]+)"', source)}
    assert raised == {code for *_, code, _ in MISFITS}


def test_all_misfits_are_listed_at_once() -> None:
    shapes = {
        **pair("gone"),
        **pair("q"),
        **CONV,
        **{f"base_model.model.{k}": v for k, v in {"norm.weight": (5,)}.items()},
    }
    base = {"q.weight": (4, 7), "c.weight": (4, 3, 3), "norm.weight": (6,)}
    problems = place(shapes, base, {"modules_to_save": ["norm"]}).problems
    assert sorted(p.code for p in problems) == ["GROUPED_CONV", "NO_SUCH_MODULE", "SHAPE_MISMATCH", "SHAPE_MISMATCH"]
    assert {p.module for p in problems} == {"gone", "q", "c", "norm.weight"}


def test_a_saved_module_that_the_base_lacks_is_new() -> None:
    found = place(pair("q") | {"score.weight": (3, 6)}, {"q.weight": (4, 6)}, {"modules_to_save": ["score"]})
    assert found.problems == ()
    assert found.sites["score.weight"] == Site(source=None, shape=(3, 6), replacement="score.weight")


def test_a_vocabulary_may_grow() -> None:
    base = {"embed_tokens.weight": (9, 6), "lm_head.weight": (9, 6)}
    found = place(dict.fromkeys(base, (12, 6)), base, base_config={"tie_word_embeddings": False})
    assert found.problems == ()
    assert found.vocab_size == 12
    assert {name: site.shape for name, site in found.sites.items()} == dict.fromkeys(base, (12, 6))


def test_an_untied_model_stays_as_it_is() -> None:
    base = {"embed_tokens.weight": (9, 6), "lm_head.weight": (9, 6)}
    config = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    found = place(EMBEDDED, base, base_config=config)
    assert (list(found.sites), found.untied, found.problems) == (["embed_tokens.weight"], False, ())


@pytest.mark.parametrize(
    ("architecture", "part", "outputs"),
    [
        ("LlamaForCausalLM", "norm.weight", ["lm_head"]),
        ("BertForMaskedLM", "cls.predictions.bias", ["cls.predictions.decoder"]),
        ("BertLMHeadModel", "cls.predictions.bias", ["cls.predictions.decoder"]),
        ("XLMRobertaForMaskedLM", "lm_head.dense.weight", ["lm_head.decoder"]),
        ("RobertaForCausalLM", "lm_head.dense.weight", ["lm_head.decoder"]),
        ("ElectraForCausalLM", "generator_predictions.dense.weight", ["generator_lm_head"]),
        ("DistilBertForMaskedLM", "vocab_layer_norm.weight", ["vocab_projector"]),
        ("ModernBertForMaskedLM", "head.dense.weight", ["decoder"]),
        ("AlbertForMaskedLM", "predictions.bias", ["predictions.decoder"]),
        ("WhisperForCausalLM", "norm.weight", ["proj_out"]),
        ("GPTNeoXForCausalLM", "norm.weight", ["embed_out"]),
        ("Gemma3ForConditionalGeneration", "norm.weight", ["lm_head"]),
        ("LlamaForSequenceClassification", "norm.weight", []),
        ("BertModel", "norm.weight", []),
    ],
)
def test_the_other_side_of_a_tie_is_known_by_its_parts_or_by_architecture(
    architecture: str, part: str, outputs: list[str]
) -> None:
    base = {"embed_tokens.weight": (9, 6), part: (6, 6)}
    found = place(EMBEDDED, base, base_config={"architectures": [architecture]})
    assert found.problems == ()
    weights = {name for name in found.sites if name.endswith(".weight")}
    assert weights == {"embed_tokens.weight", *(f"{name}.weight" for name in outputs)}
