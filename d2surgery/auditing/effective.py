"""What transformers makes of the files beside the weights: the config, how to generate, and what a tokenizer does.

All of it is asked of transformers itself, offline and with no code of the directory's own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from d2surgery.live import quiet

_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_PIECE = 4096  # texts that are tokenized at once
_TOGETHER = 32  # added tokens in one text
_PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159 × 2^10 = 3216.99!",
    "  two spaces,\ttabs\t\tand\n\nlines \r\n  end  ",
    "0123456789 1234567 12,345,678.90 1e-5 0x1F ½ ² Ⅷ ٣",
    "Ünïcödé café cafe\u0301 ﬁn Ａ ß İstanbul Ελλάδα Привет 你好，世界 こんにちは 한국어 ไทย",
    "שלום עולם مرحبا بالعالم \u200f\u200eمزيج abc",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 \u200b\ufeff\u00a0\u2028 \x00 \x7f",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # comment\n<html>&amp;</html> https://example.com/?q=1",
    "UPPER lower MiXeD don't we'll I'M aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "",
)


@contextmanager
def as_directory(files: Mapping[str, bytes | Path]) -> Iterator[Path]:
    """Contents, and files of other directories, together where transformers can read them."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, Path(folder) / name)
            else:
                (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def config_in(directory: Path) -> dict[str, Any] | str:
    """Every field of the config as transformers reads it, defaults and all; a sentence where it does not."""
    from transformers import AutoConfig

    try:
        with quiet():
            found: dict[str, Any] = plain(AutoConfig.from_pretrained(directory, **_OFFLINE).to_dict())
    except Exception as error:  # whatever the content of a config leads transformers to
        return first_line(error)
    return found


def generation_in(directory: Path) -> dict[str, Any] | str:
    """How `generate` begins: by generation_config.json, or without it by the config."""
    from transformers import GenerationConfig

    try:
        with quiet():
            try:
                read = GenerationConfig.from_pretrained(directory, local_files_only=True)
            except OSError:  # as transformers does it on loading
                read = GenerationConfig.from_pretrained(
                    directory, config_file_name="config.json", _from_model_config=True, local_files_only=True
                )
        found: dict[str, Any] = plain(read.to_dict())
    except Exception as error:  # as above
        return first_line(error)
    return found


def plain(value: Any) -> Any:
    """As JSON has it: tuples as lists, keys as strings, dtypes by name."""
    return json.loads(json.dumps(value, default=str))


def first_line(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:200]


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """What a tokenizer does, by which two of other files can be the same."""

    size: int
    vocabulary: str  # sha256 of all tokens and ids
    probes: Mapping[str, Sequence[int]]  # text -> ids, with the special tokens around it
    back: Mapping[str, str]  # what these ids decode to
    whole: str  # sha256 of the ids of every token's own text, and of what they decode to; "" where not asked
    special: Mapping[str, int | None]  # by role
    template: str | None
    padding: str
    longest: int | None


def tokenizing_in(directory: Path, texts: Sequence[str] | None = None, *, whole: bool) -> Tokenizing | str:
    """What the tokenizer of a directory does with `texts`; a sentence where transformers does not load it.

    texts: None for the usual ones and those that use every added token, alone, in a word and with spaces around.
    whole: every token of the vocabulary, too, which takes seconds.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, **_OFFLINE)
            return _tokenizing(tokenizer, texts, whole=whole)
    except Exception as error:  # whatever the files lead transformers, tokenizers and sentencepiece to
        return first_line(error)


def _tokenizing(tokenizer: Any, texts: Sequence[str] | None, *, whole: bool) -> Tokenizing:
    vocabulary = tokenizer.get_vocab()
    if texts is None:
        added = [
            f"a{token}b {token}  {token.upper()}\n{token}" for token in sorted(map(str, tokenizer.get_added_vocab()))
        ]
        texts = [*_PROBES, *("".join(added[at : at + _TOGETHER]) for at in range(0, len(added), _TOGETHER))]
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode())
    probes = dict(zip(texts, tokenizer(list(texts))["input_ids"], strict=True))
    longest = tokenizer.model_max_length
    return Tokenizing(
        size=len(tokenizer),
        vocabulary=digest.hexdigest(),
        probes=probes,
        back={text: tokenizer.decode(ids) for text, ids in probes.items()},
        whole=_whole(tokenizer, len(tokenizer)) if whole else "",
        special={role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES},
        template=_stripped(getattr(tokenizer, "chat_template", None)),
        padding=f"{tokenizer.padding_side} {tokenizer.truncation_side}",
        longest=int(longest) if longest < 1 << 40 else None,
    )


def _whole(tokenizer: Any, size: int) -> str:
    """Every token's text to ids again, which asks every merge and every piece of the vocabulary."""
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        texts = [tokenizer.decode([number]) for number in range(start, min(start + _PIECE, size))]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        digest.update(json.dumps([texts, ids]).encode())
    return digest.hexdigest()


def _stripped(template: Any) -> str | None:
    if template is None:
        return None
    return template.strip() if isinstance(template, str) else json.dumps(plain(template), sort_keys=True)
