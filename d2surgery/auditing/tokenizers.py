"""Whether a merged checkpoint's tokenizer does what the adapter's, or the base's, does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2surgery.auditing.effective import Tokenizing, as_directory, tokenizing_in
from d2surgery.errors import Problem, Severity
from d2surgery.files.reading import same_bytes
from d2surgery.files.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG, VOCABULARIES, is_of_tokenizer

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")


def either_tokenizer(adapters: Mapping[str, Path], bases: Mapping[str, Path], merged: Path) -> Iterator[Problem]:
    """The adapter's tokenizer is the right one; the base's beside the merged weights may have been meant."""
    found = list(compare_tokenizers(adapters, merged))
    if found and bases != adapters and not list(compare_tokenizers(bases, merged)):
        message = "it is the base's, although the adapter brings its own"
        yield _changed(message, severity="warning", got=found[0].message)
    else:
        yield from found


def compare_tokenizers(expected: Mapping[str, Path], merged: Path) -> Iterator[Problem]:
    """By what transformers makes of both where a file differs; what it does not load is compared as it is written.

    expected: by name, all files beside the weights; a tokenizer's config may be in them.
    """
    paths = {name: path for name, path in expected.items() if is_of_tokenizer(name)}
    others = {path.name: path for path in sorted(merged.iterdir()) if is_of_tokenizer(path.name) and path.is_file()}
    if not paths or _same_content(paths, others):
        return
    files, there = ({name: path.read_bytes() for name, path in those.items()} for those in (paths, others))
    wanted_files = [name for name in VOCABULARIES if name in files]
    if wanted_files and not {*VOCABULARIES} & there.keys():
        yield _changed("there is no tokenizer", wanted=wanted_files[0], got="none of its files")
        return
    with as_directory(paths | {name: path for name, path in expected.items() if name == "config.json"}) as directory:
        whole = _model(files) != _model(there)
        wanted = tokenizing_in(directory, whole=whole) if wanted_files else "there is none"
    if isinstance(wanted, str):
        yield from _as_written(files, there)
        return
    found = tokenizing_in(merged, [*wanted.probes], whole=whole)
    if isinstance(found, str):
        yield _changed(f"transformers does not load it: {found}")
    else:
        yield from compare_tokenizing(wanted, found)


def _same_content(files: Mapping[str, Path], there: Mapping[str, Path]) -> bool:
    """The same files, and in each the same bytes or the same JSON."""
    return files.keys() == there.keys() and all(
        same_bytes(path, there[name]) or _same_object(path, there[name]) for name, path in files.items()
    )


def _same_object(one: Path, other: Path) -> bool:
    return one.suffix == ".json" and read_object(one.read_bytes()) == read_object(other.read_bytes()) != {}


def _model(files: Mapping[str, bytes]) -> tuple[Any, ...]:
    """Vocabulary and merges as they are written, in one spelling."""
    tokenizer = read_object(files.get("tokenizer.json"))
    rest = [(name, content) for name, content in files.items() if name in VOCABULARIES and name != "tokenizer.json"]
    return _part(tokenizer, "vocab"), _part(tokenizer, "merges"), rest


def compare_tokenizing(wanted: Tokenizing, found: Tokenizing) -> Iterator[Problem]:
    """What changes the ids of a text, or the text of ids, is an error; so is another end or template of a turn."""
    if wanted.vocabulary != found.vocabulary:
        yield _changed("another vocabulary", wanted=f"{wanted.size} tokens", got=f"{found.size} tokens")
    other = [text for text, ids in wanted.probes.items() if found.probes[text] != ids]
    if other:
        short = min(other, key=len)
        ids = [str(list(one.probes[short])[:8]) for one in (wanted, found)]
        yield _changed(f"other ids for {json.dumps(short)[:60]}", wanted=ids[0], got=ids[1])
    elif back := [text for text, decoded in wanted.back.items() if found.back[text] != decoded]:
        short = min(back, key=len)
        texts = [json.dumps(one.back[short])[:60] for one in (wanted, found)]
        yield _changed("the same ids decode to another text", wanted=texts[0], got=texts[1])
    elif wanted.whole != found.whole and wanted.vocabulary == found.vocabulary:
        yield _changed("other ids, or another text of them, for some tokens of the vocabulary")
    for role in wanted.special:
        before, after = wanted.special[role], found.special[role]
        if before != after:
            severity: Severity = "warning" if before is None and role == "pad" else "error"  # trainers need one
            yield _changed(f"{role}_token", severity=severity, wanted=str(before), got=str(after))
    if wanted.template != found.template:
        yield _changed("another chat template" if found.template else "no chat template")
    if wanted.padding != found.padding:
        yield _changed("padding and truncation", wanted=wanted.padding, got=found.padding)
    if wanted.longest != found.longest:
        lengths = [str(one.longest) for one in (wanted, found)]
        yield _changed("model_max_length", severity="warning", wanted=lengths[0], got=lengths[1])


def read_object(content: bytes | None) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        value = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _changed(message: str, *, severity: Severity = "error", file: str = "", wanted: str = "", got: str = "") -> Problem:
    return Problem(
        code="TOKENIZER_CHANGED", message=message, severity=severity, file=file, wanted=wanted, got=got
    )  # fmt: skip


# As written, where transformers loads no tokenizer --------------------------------------------------------------------


def _as_written(files: Mapping[str, bytes], there: Mapping[str, bytes]) -> Iterator[Problem]:
    yield from _tokenizer_config(files.get(TOKENIZER_CONFIG), there.get(TOKENIZER_CONFIG))
    for name in VOCABULARIES:
        if name in files and name in there and files[name] != there[name]:
            yield from _tokenizer(name, files[name], there[name])
    if TOKENIZER_CONFIG in there and _template(files) != _template(there):
        yield _changed("another chat template", severity="warning")


def _tokenizer(name: str, expected: bytes, content: bytes) -> Iterator[Problem]:
    if not name.endswith(".json"):
        yield _changed("another vocabulary", file=name)
        return
    try:
        want, got = json.loads(expected), json.loads(content)
    except (ValueError, RecursionError):
        yield _changed("not JSON", file=name)
        return
    if name == "vocab.json":
        if want != got:
            yield _changed("another vocabulary", file=name)
        return
    for part, severity in _PARTS.items():
        before, after = _part(want, part), _part(got, part)
        if before != after:
            sizes = [str(len(x)) if isinstance(x, dict | list) else "" for x in (before, after)]
            yield _changed(f"another {part}", file=name, severity=severity, wanted=sizes[0], got=sizes[1])


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


def _tokenizer_config(expected: bytes | None, content: bytes | None) -> Iterator[Problem]:
    """The special tokens and whether they are added: what changes the ids that a text becomes."""
    if expected is None:
        return
    if content is None:
        yield _changed("there is none", severity="warning", file=TOKENIZER_CONFIG)
        return
    want, got = read_object(expected), read_object(content)
    for key in _SPECIAL:
        before, after = _token(want.get(key)), _token(got.get(key))
        if before is not None and after is not None and before != after:
            shown = [json.dumps(value, default=str)[:60] for value in (before, after)]
            yield _changed(key, severity="warning", file=TOKENIZER_CONFIG, wanted=shown[0], got=shown[1])


def _token(value: Any) -> Any:
    """Older files keep a token as a record."""
    return value.get("content") if isinstance(value, dict) else value


def _template(files: Mapping[str, bytes]) -> str | None:
    """The chat template, wherever it is kept."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode(errors="replace").strip()
    template = read_object(files.get(TOKENIZER_CONFIG)).get("chat_template")
    return template.strip() if isinstance(template, str) else None
