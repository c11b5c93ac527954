"""Which outputs are the input embedding again: by what stands on disk, then by the architecture's name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2surgery.files.header import Header

_INPUT_EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed_in", "tokens_embed", "embeddings",
    "word_embedding", "w",
)  # fmt: skip
# A tensor of the output on disk -> the output, which is the input embedding again unless on disk under its own name.
_HEAD_PARTS = {
    "cls.predictions.bias": "cls.predictions.decoder",  # BERT and its kin
    "lm_head.dense.weight": "lm_head.decoder",  # RoBERTa
    "predictions.bias": "predictions.decoder",  # ALBERT
    "generator_predictions.dense.weight": "generator_lm_head",  # ELECTRA
}
# Otherwise, architecture ending -> the same.
_HEADS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *(
        (f"{family}For{task}", ("proj_out",))
        for family in ("Whisper", "Moonshine", "MoonshineStreaming", "Canary", "CohereAsr")
        for task in ("ConditionalGeneration", "CausalLM")
    ),
    ("T5GemmaForConditionalGeneration", ("lm_head.out_proj",)),
    *((f"{family}ForCausalLM", ("output_projection",)) for family in ("BioGpt", "TrOCR")),
    *((f"{family}WithLMHeadModel", ("pred_layer.proj",)) for family in ("XLM", "Flaubert")),
    ("XLNetLMHeadModel", ("lm_loss",)),
    ("GitForCausalLM", ("output",)),
    ("BertGenerationDecoder", ("lm_head.decoder",)),
    ("RwkvForCausalLM", ("head",)),
    ("ModernBertDecoderForCausalLM", ("decoder",)),
    *((f"Kosmos2{version}ForConditionalGeneration", ("text_model.lm_head",)) for version in ("", "_5")),
    ("IdeficsForVisionText2Text", ("lm_head",)),
    ("ImageGPTForCausalImageModeling", ("lm_head",)),
    ("DiffusionGemmaForBlockDiffusion", ("lm_head",)),
    ("NeoMMEForMaskedLM", ("lm_head",)),
    ("SpeechT5ForSpeechToText", ("text_decoder_postnet.lm_head",)),
    ("MarianMTModel", ("lm_head",)),
    *((f"{family}ForMaskedLM", ("lm_head",)) for family in ("EuroBert", "ModernVBert", "UltraVBert", "Funnel")),
    ("T5EncoderModel", ("encoder.embed_tokens",)),
    ("T5Model", ("encoder.embed_tokens", "decoder.embed_tokens")),
    ("DistilBertForMaskedLM", ("vocab_projector",)),
    ("ModernBertForMaskedLM", ("decoder",)),
    *((f"GPTNeoX{language}ForCausalLM", ("embed_out",)) for language in ("", "Japanese")),
    ("ForCausalLM", ("lm_head",)),
    ("LMHeadModel", ("lm_head",)),
    ("DoubleHeadsModel", ("lm_head",)),
    ("ForConditionalGeneration", ("lm_head",)),
)
# Untied these are other models: Switch scales its outputs only when tied, the others tie more than the output.
_NOT_UNTIED = frozenset(
    f"{family}ForConditionalGeneration" for family in ("SwitchTransformers", "T5Gemma2", "ProphetNet")
) | {"ProphetNetForCausalLM"}
_NO_HEAD = re.compile(r"(Model|Classification|QuestionAnswering|MultipleChoice|RewardModel|Encoder)$")


@dataclass(frozen=True)
class Tie:
    """What a base ties to its input embedding."""

    embedding: str | None  # the input embedding's tensor
    aliases: Mapping[str, str]  # output tensors that are not on disk -> the embedding they are
    flagged: bool  # the config says that they are tied
    unknown_output: bool  # the config says so or does not deny it, and no output is known for this architecture


def find_tie(base: Header, config: Mapping[str, Any]) -> Tie:
    """The ties of a base; none of its outputs is on disk under a name of its own."""
    architecture = (config.get("architectures") or [""])[0] or ""
    flag = tie_flag(config)
    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    found = next((m for last in _INPUT_EMBEDDINGS for m in modules if m.rpartition(".")[2] == last), None)
    outputs = _outputs(base, architecture, found, flag) if found else ()
    aliases = [f"{output}.weight" for output in outputs if f"{output}.weight" not in base.tensors]
    embedding = f"{found}.weight" if found else None
    may_be_tied = flag is not False if architecture else bool(flag)  # not saying so is tied: transformers' default
    unknown = may_be_tied and not _by_name(architecture) and not _NO_HEAD.search(architecture)
    return Tie(embedding, dict.fromkeys(aliases, f"{found}.weight"), bool(flag), unknown)


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings, of the model or of its text part; None when the config does not say."""
    text = config.get("text_config")
    flags = (config.get("tie_word_embeddings"), text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    return next((flag for flag in flags if flag is not None), None)


def _outputs(base: Header, architecture: str, embedding: str, flag: bool | None) -> tuple[str, ...]:
    """The modules that are the input embedding again."""
    parts = tuple(
        name.removesuffix(part) + output
        for part, output in _HEAD_PARTS.items()
        for name in base.tensors
        if f".{name}".endswith(f".{part}")  # BLIP has its decoder's below `text_decoder`
    )
    outputs = (
        dict(_HEADS).get(architecture) or (parts if architecture not in _NOT_UNTIED else ()) or _by_name(architecture)
    )  # a full name goes first
    if not outputs and not architecture and flag:
        outputs = ("lm_head",)
    if outputs and embedding.rpartition(".")[2] == "shared" and "Encoder" not in architecture:
        sides = (f"{embedding.removesuffix('shared')}{side}.embed_tokens" for side in ("encoder", "decoder"))
        outputs = tuple(dict.fromkeys((*sides, *outputs)))
    return outputs


def _by_name(architecture: str) -> tuple[str, ...]:
    if architecture in _NOT_UNTIED:
        return ()
    return next((heads for ending, heads in _HEADS if architecture.endswith(ending)), ())
