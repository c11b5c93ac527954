"""Which of the files beside the weights are a tokenizer's, and how many tokens it has."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2surgery.files.reading import open_file, parse_json

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model"
)  # fmt: skip
"""A tokenizer has at least one of these."""
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
ADDED_TOKENS = "added_tokens.json"
_LIST = 16_000_000  # bytes of a list of added tokens that are looked at

_ENDINGS = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # a file named `token` holds a password
BEGINNINGS = ("token", "vocab", "merges", "special_", "added_", "spiece", "sentencepiece", "chat_template")


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: its vocabulary, merges, special tokens, chat template."""
    return name.startswith(BEGINNINGS) and name.endswith(_ENDINGS)


def last_added(files: Mapping[str, Path]) -> int:
    """The highest id of an added token, by name and path of a tokenizer's files; −1 where none is said.

    Of tokenizer.json the list of added tokens alone is parsed: its vocabulary may have millions of entries.
    """
    return max((number for name, path in files.items() for number in _added(name, path)), default=-1)


def _added(name: str, path: Path) -> Iterator[int]:
    if name == "tokenizer.json":
        for token in _list_of(path, b'"added_tokens"'):
            number = token.get("id") if isinstance(token, dict) else None
            yield from (number,) if isinstance(number, int) else ()
    elif name in (TOKENIZER_CONFIG, ADDED_TOKENS):
        said = _object(path)
        if name == ADDED_TOKENS:
            yield from (number for number in said.values() if isinstance(number, int))
        else:
            decoder = said.get("added_tokens_decoder")
            yield from (int(key) for key in (decoder if isinstance(decoder, dict) else ()) if key.isdecimal())


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one for anything else, which is the tokenizer's loader's to say."""
    with open_file(path) as file:
        try:
            said = parse_json(file.read(_LIST))
        except ValueError:
            return {}
    return said if isinstance(said, dict) else {}


def _list_of(path: Path, key: bytes) -> list[Any]:
    """The list under a key, an empty one where it cannot be made out."""
    with open_file(path) as file:
        content = file.read()
    start = content.find(b"[", content.find(key) + len(key)) if key in content else -1
    if start < 0:
        return []
    try:
        found, _ = json.JSONDecoder().raw_decode(content[start : start + _LIST].decode(errors="replace"))
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
