"""The files that stand beside the weights of a merged checkpoint: config, tokenizer and the like."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from d2surgery.errors import Problem
from d2surgery.files.tokenizers import TOKENIZER_CONFIG, VOCABULARIES, is_of_tokenizer
from d2surgery.placement.fit import Fit, new_labels
from d2surgery.placement.site import Site, is_head

Tokenizer = Literal["adapter", "base"]
"""Whose tokenizer stands beside the merged weights: the adapter's where it brings one, or the base's."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_NOT_OF_THE_RESULT = ("README.md", "d2surgery_merge.json")  # they describe the base


def companions(fit: Fit, dtype: str | None, tokenizer: Tokenizer = "adapter") -> dict[str, bytes]:
    """Name -> content. All of the base's files but weights, its card and what is hidden; the tokenizer; config.json
    with what merging changed. `dtype`: of all weights, None the base's."""
    contents = {
        path.name: path.read_bytes()
        for path in sorted(fit.base.directory.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in _NOT_OF_THE_RESULT
        if not path.name.endswith(_WEIGHT_SUFFIXES)
    }
    brought, differ = _brought(fit)
    if tokenizer == "adapter" and differ:
        if TOKENIZER_CONFIG in brought and set(VOCABULARIES) & brought.keys():  # a whole one: nothing of another stays
            contents = {name: content for name, content in contents.items() if not is_of_tokenizer(name)}
        contents |= brought
    if fit.base.config:
        contents["config.json"] = json.dumps(_config(fit, dtype), indent=2).encode() + b"\n"
    return contents


def tokenizer_problems(fit: Fit, tokenizer: Tokenizer) -> tuple[Problem, ...]:
    """That the adapter brings another tokenizer than the base's, and which one is taken."""
    names = ", ".join(differ := _brought(fit)[1])
    said = {"adapter": f"the adapter's: {names}", "base": f"the base's; the adapter's left out: {names}"}
    return (Problem(code="TOKENIZER_TAKEN", severity="info", message=said[tokenizer]),) if differ else ()


def _brought(fit: Fit) -> tuple[Mapping[str, bytes], list[str]]:
    """The files of the tokenizer beside the adapter, and which of them are not the base's; merging at 0 takes none."""
    brought = _tokenizer_in(fit.layout.path.parent) if fit.strength != 0 else {}
    own = _tokenizer_in(fit.base.directory) if brought else {}
    return brought, sorted(name for name, content in brought.items() if own.get(name) != content)


def _tokenizer_in(directory: Path) -> Mapping[str, bytes]:
    """Name -> content of a tokenizer's files; none where there is no directory, as for an adapter made in memory."""
    files = sorted(directory.iterdir()) if directory.is_dir() else ()
    return {path.name: path.read_bytes() for path in files if is_of_tokenizer(path.name) and path.is_file()}


def _config(fit: Fit, dtype: str | None) -> dict[str, Any]:
    """The base's config with what merging changed: the tie, the vocabulary, the dtype, a new head and its labels."""
    config = dict(fit.base.config)
    changes: dict[str, Any] = {}
    if fit.landing.untied:
        changes["tie_word_embeddings"] = False
    if fit.landing.vocab_size is not None:
        changes["vocab_size"] = fit.landing.vocab_size
    if dtype is not None:
        from d2surgery.files.tensors import DTYPES  # torch, which reading names and files does without

        name = str(DTYPES[dtype]).removeprefix("torch.")
        changes |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | {key: value for key, value in changes.items() if key in text}
        changes.pop("vocab_size", None)
    return config | changes | _of_head(fit)


def _of_head(fit: Fit) -> dict[str, Any]:
    """What a head that the base has not, or with another number of labels, changes in the config."""
    heads = {name: site for name, site in fit.landing.sites.items() if is_head(name) and _is_new(fit, site)}
    labels = new_labels(fit.layout)
    if not heads or labels is None:
        return {}
    changes: dict[str, Any] = {}
    if labels != len(fit.base.config.get("id2label") or (0, 1)):
        changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        changes["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    changes |= {key: labels for key in ("num_labels", "_num_labels") if key in fit.base.config}
    trained = fit.layout.about.model_class
    if trained and trained.endswith("Classification") and all(site.source is None for site in heads.values()):
        changes["architectures"] = [trained]
    return changes


def _is_new(fit: Fit, site: Site) -> bool:
    return site.source is None or site.shape != fit.base.header.tensors[site.source].shape
