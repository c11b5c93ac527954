"""Config, generation config and tokenizer of a merged checkpoint beside those that merging would have written.

Compared by meaning, not by bytes: saving again with another transformers adds defaults, moves fields and writes
tokenizer.json anew, and none of that changes the model.
"""

import json
from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from d2surgery.auditing.effective import as_directory, config_in, generation_in
from d2surgery.auditing.tokenizers import either_tokenizer, read_object
from d2surgery.errors import Problem, Severity
from d2surgery.files.base import BaseWeights
from d2surgery.files.tokenizers import is_of_tokenizer
from d2surgery.merging.companions import find_companions, merged_config
from d2surgery.placement.fit import Fit
from d2surgery.placement.ties import tie_flag

CONFIG, GENERATION = "config.json", "generation_config.json"

# Fields that say who wrote the config, or how it is used, not what the model computes.
_COSMETIC = frozenset((
    "_name_or_path", "transformers_version", "architectures", "auto_map", "torchscript", "use_cache", "use_bfloat16",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "use_mems",
    "task_specific_params", "initializer_range", "initializer_factor", "pretraining_tp", "unsloth_version",
    "unsloth_fixed", "_attn_implementation", "attn_implementation", "gradient_checkpointing", "chunk_size_feed_forward",
    "is_llama_config", "transformers.js_config", "finetuning_task", "prefix", "_model_name_or_path",
))  # fmt: skip
_UNREAD = frozenset((  # of them, those that any value does for
    "_name_or_path", "_model_name_or_path", "transformers_version", "transformers.js_config", "architectures",
    "unsloth_version", "unsloth_fixed",
))  # fmt: skip
_OF_OUTPUT = frozenset((  # of a generation config, what changes no token
    "transformers_version", "_from_model_config", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "use_cache",
))  # fmt: skip
_LABELS = frozenset(("id2label", "label2id"))
# A missing field has transformers' default, which is the base's value unless it is one of these.
_NEEDED = frozenset((
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rope_theta", "rope_scaling", "quantization_config", "sliding_window",
))  # fmt: skip


def compare_settings(fit: Fit, merged: BaseWeights, *, tied: bool) -> list[Problem]:
    """All files beside the weights, and those that merge would have written beside weights of these dtypes; tied: the
    file leaves an output to its tie. A GGUF file holds its own: beside it only what lies there is compared."""
    theirs, ours = merged.header.usual_dtype, fit.base.header.usual_dtype
    found = find_companions(fit).paths
    expected = {name: path.read_bytes() for name, path in found.items() if name == GENERATION or path.suffix == ".py"}
    if fit.base.config:
        expected[CONFIG] = json.dumps(merged_config(fit, theirs if theirs != ours else None)).encode()
    there = {path.name for path in merged.directory.iterdir()}
    if in_itself(merged):
        expected = {name: content for name, content in expected.items() if name != GENERATION or name in there}
        found = found if any(map(is_of_tokenizer, there)) else {}
    tokenizers = either_tokenizer(found, find_companions(fit, "base").paths if found else {}, merged.directory)
    want, got = read_object(expected.get(CONFIG)), merged.config
    if in_itself(merged) and CONFIG not in there:
        got = {**want, **{name: _said(value, want.get(name)) for name, value in got.items()}}
    if not want:
        return [*_generation(expected, merged.directory), *tokenizers]
    if not got:
        return [Problem(code="CONFIG_CHANGED", message="there is none", file=CONFIG), *tokenizers]
    config = _config(expected, want, got, merged.directory, tied=tied)
    return [*config, *_generation(expected, merged.directory), *tokenizers]


def _said(value: Any, wanted: Any) -> Any:
    """A number of a GGUF file, which has float32 of the one that is wanted; what it does not say is as it should be."""
    numbers = isinstance(value, float) and isinstance(wanted, float)
    return wanted if numbers and isclose(value, wanted, rel_tol=1e-6) else value


def in_itself(merged: BaseWeights) -> bool:
    """Whether the weights are a GGUF file, in which tokenizer and config are."""
    return merged.header.files[0].suffix == ".gguf"


def _config(
    expected: Mapping[str, bytes], want: Mapping[str, Any], got: Mapping[str, Any], merged: Path, *, tied: bool
) -> Iterator[Problem]:
    """By what transformers reads in both: a field that is not there has a default.

    As they are written where only cosmetic fields differ, or where transformers cannot read what is expected.
    """
    yield from _code(expected, got, merged)
    if _read(want) == _read(got) or want.get("model_type") != got.get("model_type"):
        yield from compare_config(want, got, effective=False)
        yield from _tie(want, got, tied)
        return
    with as_directory({CONFIG: expected[CONFIG]}) as directory:
        wanted = config_in(directory)
    found = _config_in(merged, got)
    if isinstance(wanted, str):
        yield from compare_config(want, got, effective=False)
        yield from _tie(want, got, tied)
    elif isinstance(found, str):
        yield Problem(code="CONFIG_CHANGED", message=f"transformers cannot read it: {found}", file=CONFIG)
    else:
        yield from compare_config(_with_classes(wanted, want), _with_classes(found, got), effective=True)
        yield from _tie(wanted, found, tied)


def _config_in(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | str:
    """As `config_in`; of a config that is not the file's own: of GGUF, or without what MLX says of its grid."""
    path = directory / CONFIG
    if path.exists() and read_object(path.read_bytes()) == config:
        return config_in(directory)
    with as_directory({CONFIG: json.dumps(config).encode()}) as made:
        return config_in(made)


def _code(expected: Mapping[str, bytes], got: Mapping[str, Any], directory: Path) -> Iterator[Problem]:
    """The model's own code, where the config of the merged model sends there."""
    named = json.dumps(got.get("auto_map") or {})
    for name, content in expected.items():
        if name.endswith(".py") and name.removesuffix(".py") in named:
            path = directory / name
            if not path.is_file() or path.read_bytes() != content:
                message = "the model's own code, which the config names, is not the base's"
                yield Problem(code="CONFIG_CHANGED", message=message, file=name, got="" if path.is_file() else "none")


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a model's class reads; nulls are not there."""
    return {name: value for name, value in _normal(config).items() if name not in _UNREAD}


def _is_cosmetic(key: str) -> bool:
    return bool({key.rpartition(".")[2], key.partition(".")[0]} & _COSMETIC)


def _with_classes(read: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' reading, with what it leaves out of it."""
    return {**read, **{name: written[name] for name in ("architectures", "auto_map") if name in written}}


def _tie(expected: Mapping[str, Any], merged: Mapping[str, Any], tied: bool) -> Iterator[Problem]:
    """A flag that makes transformers tie what is on disk apart, or leaves an output without weights."""
    want, got = tie_flag(expected), tie_flag(merged)
    if want is False and got:
        yield _changed(CONFIG, "tie_word_embeddings", want, got, "error")
    elif want and got is not True and tied:
        yield _changed(CONFIG, "tie_word_embeddings", want, got, "error" if got is False else "warning")
    elif want is not None and got is not None and want != got:
        yield _changed(CONFIG, "tie_word_embeddings", want, got, "info")


def compare_config(expected: Mapping[str, Any], merged: Mapping[str, Any], *, effective: bool) -> Iterator[Problem]:
    """Every field that matters and differs; cosmetic ones as one note, as is the rest of another architecture.

    effective: both are what transformers reads, with every field of the model; any other does nothing.
    """
    want, got = _normal(expected, nulls=effective), _normal(merged, nulls=effective)
    other = want.get("model_type") != got.get("model_type")
    notes = []
    for key in sorted(want.keys() | got.keys()):
        before, after = want.get(key), got.get(key)
        if before == after or key.rpartition(".")[2] == "tie_word_embeddings":
            continue
        declared = effective and ((key in want and key in got) or key.endswith("_token_id"))
        severity = _severity(key, before, after, declared=declared)
        if severity == "info" or (other and key != "model_type"):
            notes.append(key)
        else:
            yield _changed(CONFIG, key, before, after, severity)
    if notes:
        yield Problem(code="CONFIG_CHANGED", severity="info", file=CONFIG, message=f"also {', '.join(notes)}")


def _generation(expected: Mapping[str, bytes], merged: Path) -> Iterator[Problem]:
    """How `generate` begins, by what transformers reads where the files differ."""
    path = merged / GENERATION
    want = read_object(expected.get(GENERATION))
    got = read_object(path.read_bytes()) if path.is_file() else {}
    if want == got:
        return
    with as_directory({name: expected[name] for name in (CONFIG, GENERATION) if name in expected}) as directory:
        wanted = generation_in(directory)
    found = generation_in(merged)
    if isinstance(wanted, str) or isinstance(found, str):
        wanted, found = want, got
    problems = list(compare_generation(wanted, found))
    errors = [problem for problem in problems if problem.severity == "error"]
    if not path.is_file() and not errors:
        message = "there is none: sampling and stop tokens become the defaults"
        problems = [Problem(code="CONFIG_CHANGED", severity="warning", file=GENERATION, message=message)]
    yield from problems


def compare_generation(expected: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[Problem]:
    """Where generation stops, what it begins with, and how it samples. A token other than the end that is filled in
    where none was is a warning."""
    for key in sorted(expected.keys() | merged.keys()):
        before, after = expected.get(key), merged.get(key)
        if key not in _OF_OUTPUT and before != after:
            filled = before is None and key.endswith("_token_id") and not key.startswith("eos")
            severity: Severity = "warning" if filled else "error"
            yield _changed(GENERATION, key, before, after, severity)


def _normal(config: Mapping[str, Any], prefix: str = "", *, nulls: bool = False) -> dict[str, Any]:
    """Flat, with nulls only where they are asked for; by the names of transformers 5 where older ones mean the same."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = {"torch_dtype": "dtype"}.get(key, key)
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            flat |= _normal(value, f"{prefix}{name}.", nulls=nulls)
        elif value is not None or nulls:
            flat[f"{prefix}{name}"] = value
    for key in [key for key in flat if ".rope_theta" in key or key == "rope_theta" or ".rope_type" in key]:
        if key.startswith("rope_parameters."):
            flat[key.removeprefix("rope_parameters.")] = flat.pop(key)
    for key in [key for key in flat if key.startswith("rope_parameters.")]:
        flat[f"rope_scaling.{key.removeprefix('rope_parameters.')}"] = flat.pop(key)
    if flat.get("rope_type") == "default":
        del flat["rope_type"]
    return flat


def _severity(key: str, before: Any, after: Any, *, declared: bool) -> Severity:
    """declared: the model has this field, so that it says something whether or not a file does."""
    name, root = key.rpartition(".")[2], key.partition(".")[0]
    if name in _LABELS:  # as many labels as the head has rows
        return "error" if before and after and len(before) != len(after) else "info"
    if root == "auto_map":  # runs only where somebody trusts it
        return "warning" if after is not None else "info"
    if name in ("architectures", "dtype"):
        return "warning" if before is not None and after is not None else "info"
    if "drop" in name:  # of training, and refused where it is no share
        return "error" if isinstance(after, int | float) and not 0 <= after <= 1 else "info"
    if _is_cosmetic(key):
        return "info"
    if name.endswith("_token_id"):  # trainers fill in what is missing
        return "info" if before is None else "error" if declared or after is not None else "warning"
    if declared or (before is not None and after is not None):
        return "error"
    if {name, root} & _NEEDED or root.startswith("rope"):
        return "error" if before is not None or root in ("quantization_config", "rope_scaling") else "info"
    return "info"


def _changed(file: str, key: str, before: Any, after: Any, severity: Severity) -> Problem:
    shown = ["missing" if value is None else json.dumps(value, default=str)[:60] for value in (before, after)]
    return Problem(
        code="CONFIG_CHANGED", severity=severity, file=file, message=key, wanted=shown[0], got=shown[1]
    )  # fmt: skip
