"""Questions with answers, and prompts, from JSON or JSON lines, plain or gzip; and the text put before an answer.

Two forms of an item:

    {"instruction", "input", "output", "answer"}   the commonsense sets of LLM-Adapters: the instruction ends in "Answer
                                                   format: answer1/answer2/…", the output words the answer
    {"question", "answer", "choices"}              choices optional; answer is one of them, or its index from 0
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from d2surgery.errors import D2SurgeryError, Problem, brief, refuse
from d2surgery.files.reading import read_small

Template = Literal["auto", "chat", "alpaca", "plain"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
_ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S[^\n]*)")
_SHOWN, _ENOUGH = 20, 20_000  # malformed items that an error lists, and that are looked for: a wrong file has thousands
_MAX_BYTES, _MAX_GROUPS, _PIECE = 128_000_000, 1_000_000, 1 << 20  # of a file; its lists and objects, or its lines
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Item:
    """What is asked, what should be said, and between what to choose, in the answer's wording: () when free-form."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Every item of a file. Raises D2SurgeryError: FILE_MISSING, FILE_UNREADABLE, LFS_POINTER, or BAD_DATA with the
    line or the number (from 1) of everything malformed."""
    items: list[Item] = []
    problems: list[Problem] = []
    for entry in _entries(Path(path)):
        try:
            items.append(_item(entry.value))
        except _Malformed as fault:
            problems.append(entry.problem(str(fault)))
            if len(problems) >= _ENOUGH:
                break
    _raise_first(problems)
    return items


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Texts to try a model on: a JSON list of strings or items, JSON lines of them, or a text file, one per line.

    Raises what read_items raises.
    """
    file = Path(path)
    text = _read(file)
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return [line for line in text.splitlines() if line.strip()]
    prompts: list[str] = []
    problems: list[Problem] = []
    for entry in _entries(file):
        try:
            prompts.append(entry.value if isinstance(entry.value, str) else _item(entry.value).prompt)
        except _Malformed as fault:
            problems.append(entry.problem(str(fault)))
            if len(problems) >= _ENOUGH:
                break
    _raise_first(problems)
    return prompts


def render(prompt: str, tokenizer: Any, template: Template = "auto") -> str:
    """The text before the answer.

    chat: the tokenizer's chat template, with the opening of its turn to answer. alpaca: the prompt of Alpaca and
    LLM-Adapters. plain: the prompt and a line break. auto: chat where the tokenizer has a chat template, else alpaca.
    """
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    if template == "alpaca":
        return _ALPACA.format(prompt=prompt)
    if template == "plain":
        return f"{prompt}\n"
    if not getattr(tokenizer, "chat_template", None):
        raise refuse("USAGE", "the tokenizer has no chat template", wanted="--template alpaca or plain")
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encode(prompt: str, tokenizer: Any, template: Template = "auto") -> list[int]:
    """The tokens of `render`. A chat template writes the special tokens itself; they are not added a second time."""
    text = render(prompt, tokenizer, template)
    chat = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    return list(tokenizer(text, add_special_tokens=not chat)["input_ids"])


class _Malformed(ValueError):
    """Why one item cannot be used."""


class _Entry(NamedTuple):
    value: Any
    file: Path
    place: str  # "line 3", "item 3"

    def problem(self, message: str) -> Problem:
        return Problem(code="BAD_DATA", message=message, file=f"{self.file}, {self.place}")


def _raise_first(problems: list[Problem]) -> None:
    """All of them, or the first and how many follow."""
    if len(problems) > _SHOWN:
        rest = Problem(
            code="BAD_DATA",
            message=f"and {len(problems) - _SHOWN} more{', and that is not all' * (len(problems) >= _ENOUGH)}",
            file=problems[0].file.split(",")[0],
        )
        problems = [*problems[:_SHOWN], rest]
    if problems:
        raise D2SurgeryError(*problems)


# Files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    data = read_small(path, _MAX_BYTES, "BAD_DATA")
    if data.startswith(_LFS):
        raise refuse("LFS_POINTER", "not the data", file=str(path))
    try:
        text = (_decompressed(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (EOFError, zlib.error) as error:
        raise refuse("BAD_DATA", f"the gzip file is damaged: {error}", file=str(path)) from None
    except UnicodeDecodeError as error:
        raise refuse("BAD_DATA", f"not UTF-8 text: byte {error.start}", file=str(path)) from None
    except OverflowError:
        raise refuse("BAD_DATA", "too large", file=str(path), wanted=f"at most {_MAX_BYTES} bytes") from None
    if not text.strip():
        raise refuse("BAD_DATA", "empty", file=str(path))
    return text


def _decompressed(data: bytes) -> bytes:
    """Of gzip. Raises OverflowError where that would be more than `_MAX_BYTES`, which is counted before it is kept."""
    total = sum(map(len, _pieces(data)))
    if total > _MAX_BYTES:
        raise OverflowError
    return b"".join(_pieces(data))


def _pieces(data: bytes) -> Iterator[bytes]:
    """A piece at a time, until there are more than `_MAX_BYTES`."""
    total = 0
    while data.strip(b"\0"):  # one member after another
        member = zlib.decompressobj(wbits=31)
        while not member.eof and total <= _MAX_BYTES:
            piece = member.decompress(data, _PIECE)
            if not piece and not member.unconsumed_tail and not member.eof:
                raise EOFError("it ends before its end")
            yield piece
            data, total = member.unconsumed_tail, total + len(piece)
        data = member.unused_data if total <= _MAX_BYTES else b""


def _entries(path: Path) -> Iterator[_Entry]:
    """The items of a file with their places: of a JSON list by number, of JSON lines by line."""
    text = _read(path)
    if text.count("[") + text.count("{") > _MAX_GROUPS or text.count("\n") > _MAX_GROUPS:
        raise refuse("BAD_DATA", f"more than {_MAX_GROUPS} items", file=str(path))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise refuse("BAD_DATA", f"not JSON: {error.msg}", file=f"{path}, line {error.lineno}") from None
        yield from _lines(text, path)
        return
    except RecursionError:
        raise refuse("BAD_DATA", "nested too deeply", file=str(path)) from None
    except ValueError as error:
        raise refuse("BAD_DATA", f"not JSON: {error}", file=str(path)) from None
    values = whole if isinstance(whole, list) else [whole]
    if not values:
        raise refuse("BAD_DATA", "an empty list", file=str(path))
    yield from (_Entry(value, path, f"item {number}") for number, value in enumerate(values, 1))


def _lines(text: str, path: Path) -> Iterator[_Entry]:
    entries: list[_Entry] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028, which JSON allows in a string
        if not line.strip():
            continue
        try:
            entries.append(_Entry(json.loads(line), path, f"line {number}"))
        except json.JSONDecodeError as error:
            problems.append(_Entry(None, path, f"line {number}").problem(f"not JSON: {error.msg}"))
        except RecursionError:
            problems.append(_Entry(None, path, f"line {number}").problem("nested too deeply"))
        except ValueError as error:  # a number of too many digits
            problems.append(_Entry(None, path, f"line {number}").problem(f"not JSON: {error}"))
        if len(problems) >= _ENOUGH:
            break
    _raise_first(problems)
    yield from entries


# Items -----------------------------------------------------------------------------------------------------------


def _item(value: Any) -> Item:
    if not isinstance(value, dict):
        raise _Malformed(f"not an object but {type(value).__name__}")
    if "instruction" in value:
        return _instruction(value)
    if "question" in value:
        return _question(value)
    known = ", ".join(map(brief, list(value)[:6])) or "no field"
    raise _Malformed(f"neither instruction and output nor question and answer, but {known}")


def _instruction(value: Mapping[str, Any]) -> Item:
    instruction, output = _text(value, "instruction"), _text(value, "output")
    more = _text(value, "input", optional=True)
    prompt = f"{instruction}\n{more}" if more else instruction
    options = _options(instruction)
    label = _text(value, "answer", optional=True) or next((o for o in options if output.endswith(o)), "")
    if not options:
        return Item(prompt, output)
    if label not in options:
        raise _Malformed(f"the answer {brief(label)!r} is not in its answer format {brief('/'.join(options))}")
    before, found, after = output.rpartition(label)
    if not found:
        raise _Malformed(f"the output {brief(output)!r} does not contain the answer {brief(label)!r}")
    return Item(prompt, output, tuple(f"{before}{option}{after}" for option in options))


def _options(instruction: str) -> tuple[str, ...]:
    """What stands after the last "Answer format:", () where nothing does."""
    found = _ANSWER_FORMAT.findall(instruction)
    options = tuple(part.strip() for part in found[-1].split("/")) if found else ()
    if len(set(options)) < len(options) or "" in options or len(options) == 1:
        raise _Malformed(f"no choice between different answers in the answer format {brief('/'.join(options))!r}")
    return options


def _question(value: Mapping[str, Any]) -> Item:
    question = _text(value, "question")
    choices = value.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise _Malformed("choices is not a list of texts")
    for choice in choices:
        _text({"choices": choice}, "choices")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise _Malformed("no choice between different answers")
    answer = value.get("answer")
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise _Malformed(
                f"the answer {brief(answer)} is not an index of its {len(choices)} choices, counted from 0"
            )
        answer = choices[answer]
    answer = _text({"answer": answer}, "answer")
    if choices and answer not in choices:
        raise _Malformed(f"the answer {brief(answer)!r} is not one of its choices")
    return Item(question, answer, tuple(choices))


def _text(value: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    text = value.get(name)
    if optional and text is None:
        return ""
    if not isinstance(text, str):
        raise _Malformed(f"{name} is {'missing' if text is None else f'not a text but {type(text).__name__}'}")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise _Malformed(f"{name} holds half a character (a lone surrogate)")
    if not optional and not text.strip():
        raise _Malformed(f"{name} is empty")
    return text
