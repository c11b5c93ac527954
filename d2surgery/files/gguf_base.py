"""A model in GGUF as transformers would have it: names, the order of rows, config. F32, F16 and BF16.

    token_embd, output_norm, output           model.embed_tokens, model.norm, lm_head
    blk.N.attn_norm, ffn_norm                 input_layernorm, post_attention_layernorm
    blk.N.attn_{q,k,v,output}                 self_attn.{q,k,v,o}_proj, their biases too
    blk.N.attn_{q,k}_norm                     self_attn.{q,k}_norm
    blk.N.ffn_{gate,up,down}                  mlp.{gate,up,down}_proj

In the architecture `llama` the rows of q and k lie with the two halves of each head interleaved; they are read in
transformers' order (`TensorInfo.heads`).  Architectures whose other tensors are stored as they are, those of
`ARCHITECTURES`; Gemma's norms are stored with 1 added, so Gemma is refused.  rope_freqs follows from a config, and is
left out; a config cannot be made from it, so a model with it needs its config.json.

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

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROTATED = {"attn_q": "head_count", "attn_k": "head_count_kv"}  # in the architecture llama
_LEFT = "rope_freqs.weight"
_REAL = ("rms_norm_eps", "rope_theta")
_NUMBERS = {  # field of the config -> of the file, after the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip


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
    for name, info in header.tensors.items():
        if name == _LEFT:
            continue
        part, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or not (module := _module(part)):
            message = "no place in the models that are read"
            problems.append(Problem(code="BAD_BASE", message=message, file=str(path), module=name))
            continue
        heads = _heads(header.metadata, part.rpartition(".")[2]) if architecture == "llama" else 0
        if heads is None or (heads and info.shape[0] % (2 * heads)):
            problems.append(Problem(code="BAD_BASE", message="how many heads it has", file=str(path), module=name))
            continue
        tensors[f"{module}.{leaf}"] = info._replace(heads=heads)
    raise_errors(problems)
    return replace(header, tensors=tensors)


def _module(part: str) -> str:
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    if found is None:
        return _WHOLE.get(part, "")
    return f"model.layers.{int(found[1])}.{_PARTS[found[2]]}" if found[2] in _PARTS else ""


def _heads(metadata: Mapping[str, str], part: str) -> int | None:
    """How many heads share a tensor's rows; 0 for one whose rows lie as in transformers, None where it is not said."""
    if part not in _ROTATED:
        return 0
    said = metadata.get(f"llama.attention.{_ROTATED[part]}") or metadata.get("llama.attention.head_count", "")
    return int(said) if said.isdecimal() and 0 < int(said) < 1 << 20 else None


def config_of(header: Header) -> dict[str, Any]:
    """A config.json of what a GGUF file says of its model; {} where it says less than a config has to."""
    metadata, files = header.metadata, header.files
    architecture = metadata.get("general.architecture", "")
    numbers = dict(_numbers(metadata, architecture))
    scaled = any(name.startswith(f"{architecture}.rope.scaling") for name in metadata)
    if architecture not in ARCHITECTURES or scaled or _LEFT in read_gguf(files[0]).tensors:
        return {}
    embedding = header.tensors.get("model.embed_tokens.weight")
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **numbers,
        "vocab_size": embedding.shape[0] if embedding else 0,
        "hidden_act": "silu",
        "attention_bias": any(name.endswith("q_proj.bias") for name in header.tensors),
        "tie_word_embeddings": "lm_head.weight" not in header.tensors,
    }


def _numbers(metadata: Mapping[str, str], architecture: str) -> Iterator[tuple[str, int | float]]:
    for field, name in _NUMBERS.items():
        said = metadata.get(f"{architecture}.{name}")
        if said is not None and re.fullmatch(r"\d{1,15}(\.\d+)?(e[+-]?\d\d?)?", said):
            yield field, _shortest(float(said)) if field in _REAL else int(float(said))


def _shortest(value: float) -> float:
    """The number with the fewest digits that is this one in float32, as the file has it: 1e-06 of 9.99999997e-07."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10) if value < 1e30)
    return next((float(text) for text in texts if struct.pack("<f", float(text)) == struct.pack("<f", value)), value)
