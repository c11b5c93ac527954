"""A model in GGUF as transformers would have it: names, the order of rows, config.

    token_embd, output_norm, output           model.embed_tokens, model.norm, lm_head
    blk.N.attn_norm, ffn_norm                 input_layernorm, post_attention_layernorm
    blk.N.attn_{q,k,v,output}                 self_attn.{q,k,v,o}_proj, their biases too
    blk.N.attn_{q,k}_norm                     self_attn.{q,k}_norm
    blk.N.ffn_{gate,up,down}                  mlp.{gate,up,down}_proj
    blk.N.ffn_{gate,up,down}_exps (E, …)      block_sparse_moe.experts.{0 … E-1}.{w1,w3,w2} of Mixtral, which is `llama`
                                              with experts; mlp.experts.{0 … E-1}.{gate,up,down}_proj of Qwen 3 MoE
    blk.N.ffn_gate_inp                        block_sparse_moe.gate; mlp.gate
    Gemma 2, 3: blk.N.post_attention_norm, ffn_norm, post_ffw_norm
                                              post_attention_, pre_feedforward_, post_feedforward_layernorm

In the architecture `llama` the rows of q and k lie with the two halves of each head interleaved; they are read in
transformers' order (`TensorInfo.heads`).  Gemma's norms are stored with 1 added, which is taken off
(`TensorInfo.added`).  rope_freqs follows from a config, and is left out; a config cannot be made from it, nor of what
the files of Gemma 2 and 3 and Qwen 3 MoE say: such a model needs its config.json.

Source: llama.cpp's convert_hf_to_gguf.py, through transformers' reading of its files.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.gguf import read_gguf
from d2surgery.files.header import Header, TensorInfo

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3")
_CLASSES = {  # of what a config can be made: model_type and class
    "llama": ("llama", "LlamaForCausalLM"), "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"), "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
}  # fmt: skip
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {  # of Gemma 2 and 3, which have four
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_MIXTRAL = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
_QWEN = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_MOST_EXPERTS = 4096  # of one layer: a file can say any number of those that have no elements
_ROTATED = {"attn_q": "head_count", "attn_k": "head_count_kv"}  # in the architecture llama
_LEFT = "rope_freqs.weight"
_REAL = ("rms_norm_eps", "rope_theta")
_NUMBERS = {  # field of the config -> of the file, after the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip
_OF_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}


def read_gguf_base(path: Path) -> Header:
    """The header of a model, names and shapes as transformers has them.

    Raises D2SurgeryError what read_gguf raises, BAD_BASE with every tensor that has no place.
    """
    header = read_gguf(path)
    architecture = header.metadata.get("general.architecture", "")
    if header.metadata.get("general.type", "model") != "model" or architecture not in ARCHITECTURES:
        wanted = f"a model of {', '.join(ARCHITECTURES)}"
        raise refuse(
            "BAD_BASE", "a GGUF file that is not read as a base", file=str(path), wanted=wanted, got=architecture
        )
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    family = _family(header.metadata)
    for name, info in header.tensors.items():
        found = {} if name == _LEFT else dict(_named(name, info, family, header.metadata))
        wrong = next((message for message, read in found.items() if read is None), "")
        if wrong:
            problems.append(Problem(code="BAD_BASE", message=wrong, file=str(path), module=name))
        tensors |= {path: read for path, read in found.items() if read is not None}
    raise_errors(problems)
    return replace(header, tensors=tensors)


def _family(metadata: Mapping[str, str]) -> str:
    """The architecture; `mixtral` for `llama` with experts."""
    architecture = metadata.get("general.architecture", "")
    experts = metadata.get("llama.expert_count", "0")
    return "mixtral" if architecture == "llama" and experts not in ("0", "") else architecture


def _named(
    name: str, info: TensorInfo, family: str, metadata: Mapping[str, str]
) -> Iterator[tuple[str, TensorInfo | None]]:
    """transformers' names of a tensor with how each is read; or what is wrong with it, and None."""
    part, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    layer, inside = (f"model.layers.{int(block[1])}.", block[2]) if block else ("", part)
    parts = (_PARTS | _experts_of(family)[1] | (_NORMS if family in ("gemma2", "gemma3") else {})) if block else _WHOLE
    experts = _experts_of(family)[0].get(inside)
    if block and experts and leaf == "weight" and len(info.shape) == 3 and 0 < info.shape[0] <= _MOST_EXPERTS:
        yield from _apart(info, layer, experts)
    elif leaf not in ("weight", "bias") or inside not in parts:
        yield "no place in the models that are read", None
    else:
        heads = _heads(metadata, inside) if family in ("llama", "mixtral") else 0
        if heads is None or (heads and info.shape[0] % (2 * heads)):
            yield "how many heads it has", None
        else:
            is_norm = family.startswith("gemma") and name.endswith("norm.weight")
            yield f"{layer}{parts[inside]}.{leaf}", info._replace(heads=heads, added=1.0 if is_norm else 0.0)


def _experts_of(family: str) -> tuple[dict[str, str], dict[str, str]]:
    """The stacked tensors of a mixture's experts with the name of one expert's; its router."""
    if family == "mixtral":
        return {k: f"block_sparse_moe.experts.#.{leaf}" for k, leaf in _MIXTRAL.items()}, {
            "ffn_gate_inp": "block_sparse_moe.gate"
        }
    if family == "qwen3moe":
        return {k: f"mlp.experts.#.{leaf}" for k, leaf in _QWEN.items()}, {"ffn_gate_inp": "mlp.gate"}
    return {}, {}


def _apart(info: TensorInfo, layer: str, named: str) -> Iterator[tuple[str, TensorInfo]]:
    """Every expert's matrix of a stacked tensor."""
    count, *shape = info.shape
    size = info.nbytes // count
    stored = size if info.grid is None else size // 4 // info.grid.block * info.grid.nbytes
    for expert in range(count):
        start = info.start + expert * stored
        name = layer + named.replace("#", str(expert))
        yield f"{name}.weight", info._replace(shape=tuple(shape), start=start, stop=start + size)


def _heads(metadata: Mapping[str, str], part: str) -> int | None:
    """How many heads share a tensor's rows; 0 for one whose rows lie as in transformers, None where it is not said."""
    if part not in _ROTATED:
        return 0
    said = metadata.get(f"llama.attention.{_ROTATED[part]}") or metadata.get("llama.attention.head_count", "")
    return int(said) if said.isdecimal() and 0 < int(said) < 1 << 20 else None


def config_of(header: Header) -> dict[str, Any]:
    """A config.json of what a GGUF file says of its model; {} where it says less than a config has to."""
    metadata, files = header.metadata, header.files
    architecture, family = metadata.get("general.architecture", ""), _family(metadata)
    numbers = dict(_numbers(metadata, architecture, family))
    scaled = any(name.startswith(f"{architecture}.rope.scaling") for name in metadata)
    if family not in _CLASSES or scaled or _LEFT in read_gguf(files[0]).tensors:
        return {}
    embedding = header.tensors.get("model.embed_tokens.weight")
    return {
        "architectures": [_CLASSES[family][1]],
        "model_type": _CLASSES[family][0],
        **numbers,
        "vocab_size": embedding.shape[0] if embedding else 0,
        "hidden_act": "gelu_pytorch_tanh" if family == "gemma" else "silu",
        "attention_bias": any(name.endswith("q_proj.bias") for name in header.tensors),
        "tie_word_embeddings": "lm_head.weight" not in header.tensors,
    }


def _numbers(metadata: Mapping[str, str], architecture: str, family: str) -> Iterator[tuple[str, int | float]]:
    for field, name in (_NUMBERS | (_OF_EXPERTS if family == "mixtral" else {})).items():
        said = metadata.get(f"{architecture}.{name}")
        if said is not None and re.fullmatch(r"\d{1,15}(\.\d+)?(e[+-]?\d\d?)?", said):
            yield field, _shortest(float(said)) if field in _REAL else int(float(said))


def _shortest(value: float) -> float:
    """The number with the fewest digits that is this one in float32, as the file has it: 1e-06 of 9.99999997e-07."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10) if value < 1e30)
    return next((float(text) for text in texts if struct.pack("<f", float(text)) == struct.pack("<f", value)), value)
