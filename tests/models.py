"""Tiny models with adapters made by the real tools, and what they must become, by hand in float64.

`CASES` names a base model (transformers saves it) and a LoraConfig (PEFT trains, here: randomises, and saves it).
`effective_weights` is the formula again, written from PEFT's documentation on the model's own modules: which of them
are Conv1D, Conv2d or Embedding is asked of transformers, not of the library under test.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from d2surgery.merging import merge

T.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()

Array = npt.NDArray[np.float64]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}


def llama(tied: bool = False, **changes: Any) -> Any:
    return T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, **changes}, tie_word_embeddings=tied))


def gpt2(kind: Any = T.GPT2LMHeadModel, width: int = 16, **changes: Any) -> Any:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return kind(T.GPT2Config(**sizes, **special, **changes))


def bert(kind: Any = T.BertModel, **changes: Any) -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return kind(T.BertConfig(**(sizes | changes)))


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    return T.T5ForConditionalGeneration(T.T5Config(**sizes, decoder_start_token_id=0))


def bart() -> Any:
    sizes = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 32,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
    }  # fmt: skip
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return T.BartForConditionalGeneration(T.BartConfig(**sizes, **special))


def mixtral() -> Any:
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe() -> Any:
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SIZES, **experts, head_dim=8))


def gpt_oss(**changes: Any) -> Any:
    return T.GptOssForCausalLM(T.GptOssConfig(**{**SIZES, **changes}, num_local_experts=4, head_dim=8))


def mamba() -> Any:
    return T.MambaForCausalLM(T.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32))


def gpt_neox() -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**sizes, max_position_embeddings=16, tie_word_embeddings=True))


def convnext() -> Any:
    return T.ConvNextForImageClassification(T.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]))


def wav2vec2(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32,
        "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    return T.Wav2Vec2Model(T.Wav2Vec2Config(**sizes, **changes))


def byte_tokenizer(chat: bool = False) -> Any:
    """A token per byte, and <s>, </s>: 258 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: at for at, character in enumerate((*alphabet, "<s>", "</s>"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return fast


def _inputs(name: str) -> dict[str, Tensor]:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 9]])
    numbers = torch.Generator().manual_seed(1)
    return {
        "tokens": {"input_ids": tokens},
        "seq2seq": {"input_ids": tokens, "decoder_input_ids": tokens},
        "image": {"pixel_values": torch.randn(1, 3, 32, 32, generator=numbers)},
        "audio": {"input_values": torch.randn(1, 200, generator=numbers)},
    }[name]


@dataclass(frozen=True, kw_only=True)
class Case:
    base: Callable[[], Any]
    lora: Mapping[str, Any]
    used_as: Any = None  # the class that PEFT wraps, when it is not the one that was saved
    inputs: str = "tokens"
    peft_merges_wrongly: str = ""  # why its merge is no oracle here; its unmerged forward always is
    parameters: Mapping[str, str] = field(default_factory=dict)  # where a key does not name the adapted parameter
    options: Mapping[str, Any] = field(default_factory=dict)  # of used_as.from_pretrained


ONE_SIDE = "adds to the shared tensor, and so to both sides of the tie"
TWICE = "adds the update to the shared tensor once for each side"
BOTH = {"mlp.experts.base_layer": "mlp.experts.gate_up_proj", "mlp.experts": "mlp.experts.down_proj"}
DOWN = {"mlp.experts": "mlp.experts.down_proj"}
PATTERNS = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"k_proj": 3, "0.mlp.*proj": 5}}


def _lora(*targets: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), "r": 2, "lora_alpha": 3, **options}


def _tied() -> Any:
    return llama(tied=True)


def _experts(*parameters: str, **options: Any) -> dict[str, Any]:
    return _lora("q_proj", target_parameters=list(parameters), **options)


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES: dict[str, Case] = {
    "llama": Case(base=llama, lora=_lora(*LINEAR)),
    "llama all-linear": Case(base=llama, lora={**_lora(), "target_modules": "all-linear"}),
    "llama rslora": Case(base=llama, lora=_lora(*LINEAR, use_rslora=True)),
    "llama dora": Case(base=llama, lora=_lora(*LINEAR, use_dora=True)),
    "llama dora rslora": Case(base=llama, lora=_lora(*LINEAR, use_dora=True, use_rslora=True, **PATTERNS)),
    "llama patterns": Case(base=llama, lora=_lora(*LINEAR, **PATTERNS)),
    "llama rslora patterns": Case(base=llama, lora=_lora(*LINEAR, use_rslora=True, **PATTERNS)),
    "llama embeddings": Case(base=llama, lora=_lora("embed_tokens", "lm_head")),
    "llama embeddings dora": Case(base=llama, lora=_lora("embed_tokens", "lm_head", use_dora=True)),
    "llama saved modules": Case(base=llama, lora=_lora("q_proj", modules_to_save=["lm_head", "embed_tokens", "norm"])),
    "llama saved layer": Case(base=llama, lora=_lora("q_proj", modules_to_save=["layers.1.mlp"])),
    "llama tokens": Case(base=llama, lora=_lora("q_proj", trainable_token_indices={"embed_tokens": [1, 3]})),
    "llama tokens of both": Case(
        base=llama, lora=_lora("q_proj", trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [2]})
    ),
    "tied": Case(base=_tied, lora=_lora(*LINEAR)),
    "tied embedding": Case(base=_tied, lora=_lora("q_proj", "embed_tokens"), peft_merges_wrongly=ONE_SIDE),
    "tied head": Case(base=_tied, lora=_lora("q_proj", "lm_head"), peft_merges_wrongly=ONE_SIDE),
    "tied both": Case(base=_tied, lora=_lora("lm_head", "embed_tokens"), peft_merges_wrongly=TWICE),
    "tied embedding dora": Case(base=_tied, lora=_lora("embed_tokens", use_dora=True), peft_merges_wrongly=ONE_SIDE),
    "tied head dora": Case(base=_tied, lora=_lora("lm_head", use_dora=True), peft_merges_wrongly=ONE_SIDE),
    "tied both dora": Case(
        base=_tied, lora=_lora("lm_head", "embed_tokens", use_dora=True), peft_merges_wrongly=TWICE
    ),
    "tied ensured": Case(
        base=_tied, lora=_lora("embed_tokens", "lm_head", ensure_weight_tying=True), peft_merges_wrongly=TWICE
    ),
    "tied saved head": Case(base=_tied, lora=_lora("q_proj", modules_to_save=["lm_head"])),
    "tied saved embedding": Case(base=_tied, lora=_lora("q_proj", modules_to_save=["embed_tokens"])),
    "tied saved ensured": Case(
        base=_tied, lora=_lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "tied tokens": Case(base=_tied, lora=_lora("q_proj", trainable_token_indices=[1, 3])),
    "tied tokens and head": Case(
        base=_tied, lora=_lora("lm_head", trainable_token_indices=[1, 3]), peft_merges_wrongly=ONE_SIDE
    ),
    "gpt2": Case(
        base=gpt2, lora=_lora("c_attn", "c_proj", "wte", fan_in_fan_out=True), peft_merges_wrongly=ONE_SIDE
    ),
    "gpt2 dora": Case(base=gpt2, lora=_lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True, use_dora=True)),
    "gpt2 mixed": Case(
        base=gpt2, lora=_lora("c_attn", "wte", "lm_head", use_dora=True), peft_merges_wrongly=TWICE
    ),
    "gpt2 square": Case(base=gpt2, lora=_lora("attn.c_proj", fan_in_fan_out=True)),
    "gpt2 square dora": Case(base=gpt2, lora=_lora("attn.c_proj", fan_in_fan_out=True, use_dora=True)),
    "gpt2 head on bare base": Case(
        base=lambda: gpt2(T.GPT2Model), used_as=T.GPT2LMHeadModel, lora=_lora("c_attn", "mlp.c_proj")
    ),
    "gpt2 bare on head base": Case(base=gpt2, used_as=T.GPT2Model, lora=_lora("c_attn", "mlp.c_proj")),
    "gpt2 classifier": Case(
        base=gpt2, used_as=T.GPT2ForSequenceClassification, options={"num_labels": 3},
        lora=_lora("c_attn", task_type="SEQ_CLS"),
    ),
    "bert classifier": Case(
        base=bert, used_as=T.BertForSequenceClassification, options={"num_labels": 3},
        lora=_lora("query", "dense", task_type="SEQ_CLS"),
    ),
    "bert classifier dora": Case(
        base=lambda: bert(T.BertForSequenceClassification),
        lora=_lora("query", "dense", task_type="SEQ_CLS", use_dora=True),
    ),
    "bert bare on classifier base": Case(
        base=lambda: bert(T.BertForSequenceClassification), used_as=T.BertModel, lora=_lora("query", "value")
    ),
    "bert bias all": Case(base=bert, lora=_lora("query", bias="all")),
    "bert bias lora_only": Case(base=bert, lora=_lora("query", "dense", bias="lora_only")),
    "bert lora_bias": Case(base=bert, lora=_lora("query", "dense", lora_bias=True)),
    "bert masked embedding": Case(
        base=lambda: bert(T.BertForMaskedLM), lora=_lora("word_embeddings", "query"), peft_merges_wrongly=ONE_SIDE
    ),
    "bert decoder embedding": Case(
        base=lambda: bert(T.BertLMHeadModel, is_decoder=True),
        lora=_lora("word_embeddings"),
        peft_merges_wrongly=ONE_SIDE,
    ),
    "mamba": Case(base=mamba, lora=_lora("in_proj", "x_proj")),
    "mamba embedding": Case(base=mamba, lora=_lora("embeddings"), peft_merges_wrongly=ONE_SIDE),
    "neox head": Case(base=gpt_neox, lora=_lora("query_key_value", "lm_head"), peft_merges_wrongly=ONE_SIDE),
    "t5": Case(base=t5, inputs="seq2seq", lora=_lora("q", "wo", "shared"), peft_merges_wrongly=ONE_SIDE),
    "t5 head": Case(base=t5, inputs="seq2seq", lora=_lora("q", "lm_head"), peft_merges_wrongly=ONE_SIDE),
    "t5 encoder embedding": Case(
        base=t5, inputs="seq2seq", lora=_lora("q", "encoder.embed_tokens"), peft_merges_wrongly=ONE_SIDE
    ),
    "bart": Case(base=bart, inputs="seq2seq", lora=_lora("q_proj", "fc1", use_dora=True)),
    "bart head": Case(base=bart, inputs="seq2seq", lora=_lora("lm_head"), peft_merges_wrongly=ONE_SIDE),
    "mixtral": Case(
        base=mixtral, lora=_experts("experts.gate_up_proj", "experts.down_proj", "gate.weight"), parameters=BOTH
    ),
    "mixtral down": Case(
        base=mixtral, lora=_experts("experts.down_proj", rank_pattern={"experts.down_proj": 3}), parameters=DOWN
    ),
    "qwen3 moe": Case(
        base=qwen3_moe, parameters=BOTH,
        lora=_experts(
            "experts.gate_up_proj", "experts.down_proj", "gate.weight", use_rslora=True,
            rank_pattern={"experts.down_proj": 3}, alpha_pattern={"experts.gate_up_proj": 5},
        ),
    ),
    "gpt-oss": Case(base=gpt_oss, lora=_experts("experts.gate_up_proj", "experts.down_proj"), parameters=BOTH),
    "gpt-oss down": Case(base=gpt_oss, lora=_experts("experts.down_proj"), parameters=DOWN),
    "gpt-oss square": Case(
        base=lambda: gpt_oss(intermediate_size=16), lora=_experts("experts.down_proj"), parameters=DOWN
    ),
    "convnext": Case(
        base=convnext, inputs="image", lora=_lora("pwconv1", "patch_embeddings", "downsampling_layer.1")
    ),
    "convnext dora": Case(
        base=convnext, inputs="image", lora=_lora("pwconv1", "patch_embeddings", "downsampling_layer.1", use_dora=True)
    ),
    "wav2vec2": Case(base=wav2vec2, inputs="audio", lora=_lora("conv_layers.1.conv", "projection", "k_proj")),
    "wav2vec2 dora": Case(base=wav2vec2, inputs="audio", lora=_lora("conv_layers.1.conv", "k_proj", use_dora=True)),
}  # fmt: skip


class Built:
    """One case on disk: `base`, `adapter`, and PEFT's view of the two."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.base, self.adapter = folder / "base", folder / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice about ties and fan_in_fan_out is not what is tested
            torch.manual_seed(0)
            model = case.base()
            self.kind = case.used_as or type(model)
            scatter(model)
            model.save_pretrained(self.base)
            torch.manual_seed(1)  # a new head's start
            self._train()

    def _train(self) -> None:
        model = get_peft_model(self.load(self.base), LoraConfig(**self.case.lora))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(self.adapter)

    def load(self, directory: Path, dtype: Any = torch.float32) -> Any:
        """The model at a directory, in the class the adapter was trained in."""
        options = {} if directory.name.startswith("merged") else self.case.options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.kind.from_pretrained(directory, dtype=dtype, local_files_only=True, **options).eval()

    def with_peft(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(self.load(self.base), self.adapter).eval()

    def inputs(self) -> dict[str, Tensor]:
        return _inputs(self.case.inputs)

    def forward(self, model: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**self.inputs())[0]
        return output

    def in_float64(self, model: Any) -> Tensor:
        """The same, where only the weights' rounding shows: in float32 some models' sums err by 1e-5. Experts' grouped
        products are of float32 at most."""
        if any(".experts." in name for name, _ in model.named_parameters()):
            return self.forward(model)
        inputs = {name: part.double() if part.is_floating_point() else part for name, part in self.inputs().items()}
        with torch.no_grad():
            output: Tensor = model.double()(**inputs)[0]
        return output

    @cached_property
    def merged(self) -> Path:
        """What d2surgery makes of it, in float32."""
        merge(self.base, self.adapter, self.folder / "merged")
        return self.folder / "merged"

    @cached_property
    def unmerged(self) -> Tensor:
        return self.forward(self.with_peft())

    @cached_property
    def tensors(self) -> dict[str, Array]:
        return {key: f64(tensor) for key, tensor in load_file(self.adapter / "adapter_model.safetensors").items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.adapter / "adapter_config.json").read_text())
        return config

    def expected(self, base: Path) -> dict[str, Array]:
        """What the model's state must become when `base` (this case's, in any dtype) gets the adapter."""
        return effective_weights(self.load(base, dtype="auto"), self.tensors, self.config, self.case.parameters)


def scatter(model: Any) -> None:
    """No parameter stays zero or one: a lost bias or norm would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def f64(tensor: Tensor) -> Array:
    array: Array = tensor.detach().to(torch.float64).numpy()
    return array


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


# The formula by hand --------------------------------------------------------------------------------------------------


def effective_weights(
    model: Any,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    parameters: Mapping[str, str],
    strength: float = 1.0,
) -> dict[str, Array]:
    """Every weight of `model` after the adapter, in float64, from the raw tensors of the file and its config."""
    modules = dict(model.named_modules())
    result = {name: f64(tensor) for name, tensor in state(model).items()}
    files = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    for name, value in files.items():
        if "lora_" not in name and "trainable_tokens" not in name:
            result[name.replace(".base_layer.", ".")] = value
    for name, rows in files.items():
        if name.endswith(".token_adapter.trainable_tokens_delta"):
            _replace_rows(model, result, name.removesuffix(".token_adapter.trainable_tokens_delta"), rows, config)
    for name, A in files.items():
        if not name.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        module = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", name)
        B = files[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        target = next((module[: -len(end)] + p for end, p in parameters.items() if module.endswith(end)), None)
        s = strength * scaling(target or module, config)
        if target is not None:
            result[target] = result[target] + s * experts_update(A, B, modules[target.rpartition(".")[0]])
            continue
        W = result[f"{module}.weight"]
        m = files.get(f"{module}.lora_magnitude_vector")
        result[f"{module}.weight"] = _adapted(modules[module], W, A, B, m, s)
        if f"{module}.lora_B.bias" in files:
            result[f"{module}.bias"] = result[f"{module}.bias"] + s * files[f"{module}.lora_B.bias"]
    return result


def scaling(module: str, config: Mapping[str, Any]) -> float:
    def first(patterns: Mapping[str, float], default: float) -> float:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    r, alpha = first(config["rank_pattern"], config["r"]), first(config["alpha_pattern"], config["lora_alpha"])
    return alpha / (sqrt(r) if config["use_rslora"] else r)


def experts_update(A: Array, B: Array, experts: Any) -> Array:
    """A is expert-slowest, B expert-fastest; GPT-OSS stores (E, in, out)."""
    E = experts.num_experts
    r = A.shape[0] // E
    axes = "ore,eri->eio" if getattr(experts, "is_transposed", False) else "ore,eri->eoi"
    return np.asarray(np.einsum(axes, B.reshape(B.shape[0], r, E), A.reshape(E, r, A.shape[1])))


def _adapted(module: Any, W: Array, A: Array, B: Array, m: Array | None, s: float) -> Array:
    update = s * (B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1))
    swap = isinstance(module, Conv1D | nn.Embedding)
    V = (W.T if swap else W.reshape(W.shape[0], -1)) + update
    if m is not None:
        V = V * (m.reshape(-1) / np.sqrt((V * V).sum(1)))[:, None]
    return V.T if swap else V.reshape(W.shape)


def _replace_rows(model: Any, result: dict[str, Array], module: str, rows: Array, config: Mapping[str, Any]) -> None:
    chosen = config["trainable_token_indices"]
    if isinstance(chosen, dict):
        chosen = next(v for k, v in chosen.items() if module.endswith(k))
    sides = [f"{module}.weight", *(["lm_head.weight"] if model.config.tie_word_embeddings else [])]
    for side in sides:
        result[side] = result[side].copy()
        result[side][chosen] = rows


# Rounding by hand -----------------------------------------------------------------------------------------------------

DIGITS = {"F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}  # bits of a significand, log2 of the least number


def spacing(values: Array, dtype: str) -> Array:
    """One unit in the last place at each value."""
    bits, least = DIGITS[dtype]
    return np.asarray(np.exp2(np.maximum(np.frexp(values)[1] - bits, least).astype(np.float64)))


def round_to(values: Array, dtype: str) -> Array:
    """Nearest, ties to even, in one step; scaling by a power of two is exact."""
    unit = spacing(values, dtype)
    return np.asarray(np.rint(values / unit) * unit)
