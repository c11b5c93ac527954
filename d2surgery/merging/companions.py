"""The files that stand beside the weights of a merged checkpoint: config, tokenizer and the like."""

import json
from typing import Any

from d2surgery.files.tensors import DTYPES
from d2surgery.files.tokenizers import is_of_tokenizer
from d2surgery.placement.fit import Fit, new_labels

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_NOT_OF_THE_RESULT = ("README.md", "d2surgery_merge.json")  # they describe the base


def companions(fit: Fit, dtype: str | None) -> dict[str, bytes]:
    """Name -> content. All of the base's files but weights, its card and what is hidden; the adapter's tokenizer when
    it brings another vocabulary; config.json with what merging changed. `dtype`: of all weights, None the base's."""
    contents = {
        path.name: path.read_bytes()
        for path in sorted(fit.base.directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in _NOT_OF_THE_RESULT
        if not path.name.endswith(_WEIGHT_SUFFIXES)
    }
    if fit.landing.vocab_size is not None:
        beside = sorted(fit.layout.path.parent.iterdir())
        contents |= {path.name: path.read_bytes() for path in beside if is_of_tokenizer(path.name)}
    if fit.base.config:
        contents["config.json"] = json.dumps(_config(fit, dtype), indent=2).encode() + b"\n"
    return contents


def _config(fit: Fit, dtype: str | None) -> dict[str, Any]:
    """The base's config with what merging changed: the tie, the vocabulary, the dtype, a new head's labels."""
    config = dict(fit.base.config)
    changes: dict[str, Any] = {}
    if fit.landing.untied:
        changes["tie_word_embeddings"] = False
    if fit.landing.vocab_size is not None:
        changes["vocab_size"] = fit.landing.vocab_size
    if dtype is not None:
        name = str(DTYPES[dtype]).removeprefix("torch.")
        changes |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | {key: value for key, value in changes.items() if key in text}
        changes.pop("vocab_size", None)
    labels = new_labels(fit.layout)
    if labels is not None and _has_new_head(fit) and labels != len(config.get("id2label") or (0, 1)):
        changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        changes["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config | changes


def _has_new_head(fit: Fit) -> bool:
    """Whether the adapter brings a tensor that the base lacks; in a classifier that is its head."""
    return any(site.source is None for site in fit.landing.sites.values())
