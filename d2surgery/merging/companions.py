"""The files that stand beside the weights of a merged checkpoint: config, tokenizer and the like."""

import json
from typing import Any

from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import DTYPES
from d2surgery.formats.layout import Layout
from d2surgery.placement.sites import Landing

_TOKENIZER_FILES = ("token", "vocab", "merges", "special_", "added_", "spiece", "sentencepiece", "chat_template")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_NOT_OF_THE_RESULT = ("README.md", "d2surgery_merge.json")  # they describe the base


def companions(base: BaseWeights, layout: Layout, landing: Landing, dtype: str | None) -> dict[str, bytes]:
    """Name -> content. All of the base's files but weights, its card and what is hidden; the adapter's tokenizer when
    it brings another vocabulary; config.json with what merging changed."""
    contents = {
        path.name: path.read_bytes()
        for path in sorted(base.directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in _NOT_OF_THE_RESULT
        if not path.name.endswith(_WEIGHT_SUFFIXES)
    }
    if landing.vocab_size is not None:
        beside = sorted(layout.path.parent.iterdir())
        contents |= {path.name: path.read_bytes() for path in beside if path.name.startswith(_TOKENIZER_FILES)}
    if base.config:
        contents["config.json"] = json.dumps(_config(base.config, layout, landing, dtype), indent=2).encode() + b"\n"
    return contents


def _config(base: dict[str, Any], layout: Layout, landing: Landing, dtype: str | None) -> dict[str, Any]:
    """The base's config with what merging changed: the tie, the vocabulary, the dtype, a new head's labels."""
    config = dict(base)
    changes: dict[str, Any] = {}
    if landing.untied:
        changes["tie_word_embeddings"] = False
    if landing.vocab_size is not None:
        changes["vocab_size"] = landing.vocab_size
    if dtype is not None:
        name = str(DTYPES[dtype]).removeprefix("torch.")
        changes |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | {key: value for key, value in changes.items() if key in text}
        changes.pop("vocab_size", None)
    labels = _new_labels(base, layout, landing)
    if labels is not None:
        changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        changes["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config | changes


def _new_labels(base: dict[str, Any], layout: Layout, landing: Landing) -> int | None:
    """The classes of a classification head that the adapter brings and the base's config does not expect."""
    if layout.about.task not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [site for name, site in landing.sites.items() if name.endswith(("score.weight", "classifier.weight"))]
    count = next((site.shape[0] for site in heads if site.source is None), None)
    return None if count == len(base.get("id2label") or (0, 1)) else count
