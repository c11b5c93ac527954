"""Config, generation config and tokenizer of a merged checkpoint beside those that merging would have written.

Compared by meaning, not by bytes: saving again with another transformers adds defaults, moves fields and writes
tokenizer.json anew, and none of that changes the model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem, Severity
from d2surgery.files.base import BaseWeights
from d2surgery.files.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG, VOCABULARIES
from d2surgery.placement.ties import tie_flag

_GENERATION = "generation_config.json"
_TOKENIZING = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")

# Fields that say who wrote the config, or how it is used, not what the model computes.
_COSMETIC = frozenset((
    "_name_or_path", "transformers_version", "architectures", "auto_map", "torchscript", "use_cache", "use_bfloat16",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "use_mems",
    "task_specific_params", "initializer_range", "attention_dropout", "hidden_dropout", "dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "pretraining_tp", "unsloth_version", "_attn_implementation", "attn_implementation",
    "gradient_checkpointing", "unsloth_fixed", "chunk_size_feed_forward", "is_llama_config", "transformers.js_config",
    "finetuning_task", "prefix", "_model_name_or_path",
))  # fmt: skip
_TOKENS = frozenset(("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"))
# A missing field has transformers' default, which is the base's value unless it is one of these.
_NEEDED = frozenset((
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rope_theta", "rope_scaling", "quantization_config", "sliding_window",
))  # fmt: skip


def compare_settings(
    expected: Mapping[str, bytes], merged: BaseWeights, or_tokenizer: Mapping[str, bytes], *, tied: bool
) -> list[Problem]:
    """All files beside the weights. `expected`: name -> content, with the adapter's tokenizer where it brings one;
    `or_tokenizer`: the same with the base's; tied: the file leaves an output to its tie."""
    want, got = _json(expected.get("config.json")), merged.config
    if want and not got:
        missing = Problem(code="CONFIG_CHANGED", message="there is none", file="config.json")
        return [missing, *_either_tokenizer(expected, or_tokenizer, merged.directory)]
    return [
        *(compare_config(want, got) if want else ()),
        *(_tie(want, got, tied) if want else ()),
        *_generation(expected.get(_GENERATION), merged.directory / _GENERATION),
        *_either_tokenizer(expected, or_tokenizer, merged.directory),
    ]


def _either_tokenizer(adapters: Mapping[str, bytes], bases: Mapping[str, bytes], merged: Path) -> Iterator[Problem]:
    """The adapter's tokenizer is the right one; the base's beside the merged weights may have been meant."""
    found = list(compare_tokenizers(adapters, merged))
    if found and bases != adapters and not list(compare_tokenizers(bases, merged)):
        message = "it is the base's, although the adapter brings its own"
        yield Problem(code="TOKENIZER_CHANGED", severity="warning", message=message, got=found[0].message)
    else:
        yield from found


def _json(content: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(content) if content else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _tie(expected: Mapping[str, Any], merged: Mapping[str, Any], tied: bool) -> Iterator[Problem]:
    """A flag that makes transformers tie what is on disk apart, or leaves an output without weights."""
    want, got = tie_flag(expected), tie_flag(merged)
    if want is False and got:
        yield _changed("config.json", "tie_word_embeddings", want, got, "error")
    elif want and got is not True and tied:
        yield _changed("config.json", "tie_word_embeddings", want, got, "error" if got is False else "warning")
    elif want is not None and got is not None and want != got:
        yield _changed("config.json", "tie_word_embeddings", want, got, "info")


def compare_config(expected: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[Problem]:
    """Every field that matters and differs; cosmetic ones as one note, as is the rest of another architecture."""
    want, got = _normal(expected), _normal(merged)
    other = want.get("model_type") != got.get("model_type")
    notes = []
    for key in sorted(want.keys() | got.keys()):
        before, after = want.get(key), got.get(key)
        if before == after or key.rpartition(".")[2] == "tie_word_embeddings":
            continue
        severity = _severity(key, key in want, key in got)
        if severity == "info" or (other and key != "model_type"):
            notes.append(key)
        else:
            yield _changed("config.json", key, before, after, severity)
    if notes:
        yield Problem(code="CONFIG_CHANGED", severity="info", file="config.json", message=f"also {', '.join(notes)}")


def _generation(expected: bytes | None, path: Path) -> Iterator[Problem]:
    if path.is_file():
        yield from compare_generation(_json(expected), _json(path.read_bytes()))
    elif expected is not None:
        message = "there is none: sampling and stop tokens become the defaults"
        yield Problem(code="CONFIG_CHANGED", severity="warning", file=path.name, message=message)


def compare_generation(expected: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[Problem]:
    """Sampling defaults and special tokens: they change answers, not the model."""
    for key in sorted(expected.keys() | merged.keys()):
        if key in ("transformers_version", "_from_model_config") or expected.get(key) == merged.get(key):
            continue
        severity: Severity = "warning" if key in expected else "info"
        yield _changed("generation_config.json", key, expected.get(key), merged.get(key), severity)


def compare_tokenizers(expected: Mapping[str, bytes], merged: Path) -> Iterator[Problem]:
    """By vocabulary, merges and added tokens where the files differ; a missing tokenizer is an error."""
    wanted = [name for name in VOCABULARIES if name in expected]
    there = [name for name in wanted if (merged / name).is_file()]
    if wanted and not any((merged / name).is_file() for name in VOCABULARIES):
        got = "none of its files"
        yield Problem(code="TOKENIZER_CHANGED", message="there is no tokenizer", wanted=wanted[0], got=got)
    else:
        yield from _tokenizer_config(expected.get(TOKENIZER_CONFIG), merged / TOKENIZER_CONFIG)
    for name in there:
        content = (merged / name).read_bytes()
        if content != expected[name]:
            yield from _tokenizer(name, expected[name], content)
    yield from _templates(expected, merged)


def _normal(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat, without nulls, with the names of transformers 5 where older ones mean the same."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = {"torch_dtype": "dtype"}.get(key, key)
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            inside = _normal(value, f"{prefix}{name}.")
            flat |= {k: v for k, v in inside.items() if v is not None}
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    for key in [key for key in flat if ".rope_theta" in key or key == "rope_theta" or ".rope_type" in key]:
        if key.startswith("rope_parameters."):
            flat[key.removeprefix("rope_parameters.")] = flat.pop(key)
    for key in [key for key in flat if key.startswith("rope_parameters.")]:
        flat[f"rope_scaling.{key.removeprefix('rope_parameters.')}"] = flat.pop(key)
    if flat.get("rope_type") == "default":
        del flat["rope_type"]
    return flat


def _severity(key: str, before: bool, after: bool) -> Severity:
    name = key.rpartition(".")[2]
    root = key.partition(".")[0]
    if name in _COSMETIC or root in _COSMETIC:
        return "info"
    if name in _TOKENS or name == "dtype":
        return "warning" if before else "info"
    if before and after:
        return "error"
    if {name, root} & _NEEDED or root.startswith("rope"):
        return "error" if before or root in ("quantization_config", "rope_scaling") else "info"
    return "info"


def _tokenizer(name: str, expected: bytes, content: bytes) -> Iterator[Problem]:
    if not name.endswith(".json"):
        yield Problem(code="TOKENIZER_CHANGED", message="another vocabulary", file=name)
        return
    try:
        want, got = json.loads(expected), json.loads(content)
    except ValueError:
        yield Problem(code="TOKENIZER_CHANGED", message="not JSON", file=name)
        return
    if name == "vocab.json":
        if want != got:
            yield Problem(code="TOKENIZER_CHANGED", message="another vocabulary", file=name)
        return
    for part, severity in _PARTS.items():
        before, after = _part(want, part), _part(got, part)
        if before != after:
            sizes = [str(len(x)) if isinstance(x, dict | list) else "" for x in (before, after)]
            yield Problem(
                code="TOKENIZER_CHANGED", message=f"another {part}", file=name, severity=severity, wanted=sizes[0],
                got=sizes[1],
            )  # fmt: skip


_PARTS: dict[str, Severity] = {
    "vocab": "error",
    "merges": "error",
    "added_tokens": "error",
    "normalizer": "warning",
    "pre_tokenizer": "warning",
    "post_processor": "warning",
    "decoder": "warning",
}


def _part(tokenizer: Any, part: str) -> Any:
    """A part of tokenizer.json in one spelling: merges as pairs, added tokens as id and text."""
    if not isinstance(tokenizer, dict):
        return None
    if part == "added_tokens":
        tokens = tokenizer.get(part)
        if not isinstance(tokens, list):
            return tokens
        return {str(t.get("id")): t.get("content") for t in tokens if isinstance(t, dict)}
    if part not in ("vocab", "merges"):
        return tokenizer.get(part)
    model = tokenizer.get("model")
    value = model.get(part) if isinstance(model, dict) else None
    if part == "merges" and isinstance(value, list):
        return [m.split(" ") if isinstance(m, str) else m for m in value]
    return value


def _tokenizer_config(expected: bytes | None, path: Path) -> Iterator[Problem]:
    """The special tokens and whether they are added: what changes the ids that a text becomes."""
    if expected is None:
        return
    if not path.is_file():
        yield Problem(code="TOKENIZER_CHANGED", severity="warning", file=path.name, message="there is none")
        return
    want, got = _json(expected), _json(path.read_bytes())
    for key in _TOKENIZING:
        before, after = _token(want.get(key)), _token(got.get(key))
        if before is not None and after is not None and before != after:
            yield replace(_changed(path.name, key, before, after, "warning"), code="TOKENIZER_CHANGED")


def _token(value: Any) -> Any:
    """Older files keep a token as a record."""
    return value.get("content") if isinstance(value, dict) else value


def _templates(expected: Mapping[str, bytes], merged: Path) -> Iterator[Problem]:
    """The chat template, wherever it is kept."""
    there = {
        path.name: path.read_bytes() for path in (merged / CHAT_TEMPLATE, merged / TOKENIZER_CONFIG) if path.is_file()
    }
    want, got = _template(expected), _template(there)
    if TOKENIZER_CONFIG in there and want != got:
        yield Problem(code="TOKENIZER_CHANGED", message="another chat template", severity="warning")


def _template(files: Mapping[str, bytes]) -> str | None:
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode(errors="replace").strip()
    try:
        template = json.loads(files.get(TOKENIZER_CONFIG, b"{}")).get("chat_template")
    except (ValueError, AttributeError):
        return None
    return template.strip() if isinstance(template, str) else None


def _changed(file: str, key: str, before: Any, after: Any, severity: Severity) -> Problem:
    shown = ["missing" if value is None else json.dumps(value, default=str)[:60] for value in (before, after)]
    return Problem(
        code="CONFIG_CHANGED", severity=severity, file=file, message=key, wanted=shown[0], got=shown[1]
    )  # fmt: skip
