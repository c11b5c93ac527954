"""The files that stand beside the weights of a merged checkpoint: config, tokenizer and the like."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d2surgery.errors import Problem
from d2surgery.files.held import Seen
from d2surgery.files.reading import same_bytes
from d2surgery.files.tokenizers import TOKENIZER_CONFIG, VOCABULARIES, is_of_tokenizer, last_added
from d2surgery.placement.fit import Fit, new_labels
from d2surgery.placement.site import Site, is_head

Tokenizer = Literal["adapter", "base"]
"""Whose tokenizer stands beside the merged weights: the adapter's where it brings one, or the base's."""

_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".tflite", ".index.json",
)  # fmt: skip
_LARGEST = 1 << 28  # bytes: no vocabulary has as many, and they are held in memory
_NOT_OF_THE_RESULT = (
    "README.md", "d2surgery_merge.json",  # they describe the base
    "train.toml", "inputs.json", "metrics.jsonl", "all_results.json", "eval_results.json", "train_results.json",
    "nohup.out",
)  # fmt: skip
_OF_TRAINING = (
    "adapter_", "optimizer", "scheduler", "rng_state", "scaler", "trainer_", "training_", "events.out.tfevents",
    "zero_to_fp32",
)  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """Which files will stand beside the weights, as they were found, and what of the base's directory will not."""

    files: Mapping[str, Seen]
    left: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def copied(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    @property
    def paths(self) -> dict[str, Path]:
        return {name: file.path for name, file in self.files.items()}

    def contents(self, fit: Fit, dtype: str | None) -> dict[str, bytes]:
        """Name -> content, that of config.json with what merging changed. `dtype`: of all weights, None the base's."""
        contents = {name: file.path.read_bytes() for name, file in self.files.items()}
        if fit.base.config:
            contents["config.json"] = json.dumps(merged_config(fit, dtype), indent=2).encode() + b"\n"
        return contents


def find_companions(fit: Fit, tokenizer: Tokenizer = "adapter") -> Companions:
    """All of the base's files but weights and what is not of a model, and the tokenizer; nothing hidden."""
    entries = sorted(path for path in fit.base.directory.iterdir() if not path.name.startswith("."))
    files = {path.name: Seen(path) for path in entries if path.is_file() and _is_of_model(path)}
    left = [path.name for path in entries if path.name not in files and not _is_read(path, fit)]
    brought = _tokenizer_in(fit.layout.path.parent) if fit.strength != 0 else {}
    own = _tokenizer_in(fit.base.directory) if brought else {}
    differ = sorted(
        name for name, file in brought.items() if name not in own or not same_bytes(own[name].path, file.path)
    )
    if tokenizer == "adapter" and differ:
        if TOKENIZER_CONFIG in brought and set(VOCABULARIES) & brought.keys():  # a whole one: nothing of another stays
            left += [name for name in files if is_of_tokenizer(name) and name not in brought]
            files = {name: file for name, file in files.items() if not is_of_tokenizer(name)}
        files |= brought
    problems = (*_tokenizer_problems(differ, tokenizer), *(_without_rows(fit, files) if differ else ()))
    return Companions(files, tuple(sorted(left)), problems)


def _is_of_model(path: Path) -> bool:
    """Not weights, nor what an adapter or its training left in the directory of a model: transformers would apply such
    an adapter to the merged weights again. Not the card, which describes the base."""
    name = path.name
    weights = name.endswith(_WEIGHT_SUFFIXES) or path.stat().st_size > _LARGEST
    return not (weights or name in _NOT_OF_THE_RESULT or name.startswith(_OF_TRAINING))


def _is_read(path: Path, fit: Fit) -> bool:
    """Whether its content is in the merged weights."""
    return path in fit.base.header.files or any(path == file.path for file in fit.base.seen)


def _tokenizer_problems(differ: Sequence[str], tokenizer: Tokenizer) -> tuple[Problem, ...]:
    """That the adapter brings another tokenizer than the base's, and which one is taken."""
    names = ", ".join(differ)
    said = {"adapter": f"the adapter's: {names}", "base": f"the base's; the adapter's left out: {names}"}
    return (Problem(code="TOKENIZER_TAKEN", severity="info", message=said[tokenizer]),) if differ else ()


def _without_rows(fit: Fit, files: Mapping[str, Seen]) -> Iterator[Problem]:
    """A tokenizer that gives ids for which the embedding has no rows."""
    text = fit.base.config.get("text_config")
    rows = fit.landing.vocab_size or (text if isinstance(text, dict) else fit.base.config).get("vocab_size")
    last = last_added({name: file.path for name, file in files.items()})
    if isinstance(rows, int) and last >= rows:
        message = "the tokenizer has more tokens than the embedding has rows"
        yield Problem(
            code="TOKENS_WITHOUT_ROWS", severity="warning", message=message,
            wanted=f"ids below {rows}", got=f"ids up to {last}",
        )  # fmt: skip


def _tokenizer_in(directory: Path) -> Mapping[str, Seen]:
    """Name -> a tokenizer's file; none where there is no directory, as for an adapter made in memory."""
    files = sorted(directory.iterdir()) if directory.is_dir() else ()
    return {path.name: Seen(path) for path in files if is_of_tokenizer(path.name) and path.is_file()}


def merged_config(fit: Fit, dtype: str | None) -> dict[str, Any]:
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
