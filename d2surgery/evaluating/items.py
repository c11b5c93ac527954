"""Questions with answers, and prompts, from files and datasets; and the text put before an answer."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from d2surgery.errors import Problem, refuse
from d2surgery.evaluating.forms import Item, Malformed, items_of
from d2surgery.evaluating.sources import ENOUGH, entries, raise_first, read_text

Template = Literal["auto", "chat", "alpaca", "plain"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
By = Literal["likelihood", "normalised", "generation"]
"""How a model chooses: the greatest log-probability of a choice's tokens, the same per byte of the choice, or the
first choice that its own words name."""
WAYS: tuple[By, ...] = get_args(By)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def read_items(source: str | os.PathLike[str]) -> list[Item]:
    """Every item of a file or dataset (see `read_entries`)."""
    return [item for entry in read_entries(source) for item in entry]


def read_entries(source: str | os.PathLike[str]) -> list[list[Item]]:
    """The items of each entry: one, but of a conversation one for each answer. source: as `sources.entries` takes it.

    Raises D2SurgeryError: FILE_MISSING, FILE_UNREADABLE, LFS_POINTER, HUB_UNREACHABLE, NO_DATASETS, or BAD_DATA with
    the line or the number (from 1) of everything malformed.
    """
    found: list[list[Item]] = []
    problems: list[Problem] = []
    for entry in entries(source):
        try:
            found.append(items_of(entry.value))
        except Malformed as fault:
            problems.append(entry.problem(str(fault)))
            if len(problems) >= ENOUGH:
                break
    raise_first(problems)
    return found


@dataclass(frozen=True, repr=False)
class Task:
    """Items between whose choices a model can choose."""

    name: str
    items: tuple[Item, ...]

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.items)} items)"


def read_task(path: str | os.PathLike[str], limit: int | None = None) -> Task:
    """The items of a file (see `items`); `limit` of them, evenly spaced, since files may be sorted.

    Raises what read_items raises, and BAD_DATA for items without choices.
    """
    items = read_items(path)
    free = [number for number, item in enumerate(items, 1) if not item.choices]
    if free:
        got = f"items {', '.join(map(str, free[:8]))}{' …' if len(free) > 8 else ''}"
        raise refuse("BAD_DATA", "nothing to choose between", file=str(path), wanted="choices", got=got)
    if limit is not None and limit < len(items):
        items = [items[at * len(items) // limit] for at in range(limit)]
    return Task(re.sub(r"\.(jsonl?|gz)", "", Path(path).name), tuple(items))


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Texts to try a model on: a JSON list of strings or items, JSON lines of them, or a text file, one per line.

    Raises what read_entries raises.
    """
    file = Path(path)
    text = read_text(file)
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return [line for line in text.splitlines() if line.strip()]
    prompts: list[str] = []
    problems: list[Problem] = []
    for entry in entries(file):
        try:
            value = entry.value
            prompts += [value] if isinstance(value, str) else [item.opening for item in items_of(value)[:1]]
        except Malformed as fault:
            problems.append(entry.problem(str(fault)))
            if len(problems) >= ENOUGH:
                break
    raise_first(problems)
    return prompts


def render(asked: Item | str, tokenizer: Any, template: Template = "auto") -> str:
    """The text before the answer.

    chat: the tokenizer's chat template, with the opening of its turn to answer. alpaca: the prompt of Alpaca and
    LLM-Adapters. plain: the prompt and a line break. auto: what is bare as it is, else chat where the tokenizer has a
    chat template, else alpaca. Raises BAD_DATA for a conversation without a chat template, or one that it refuses.
    """
    item = asked if isinstance(asked, Item) else Item(asked, "")
    if template == "auto" and item.bare:
        return item.prompt
    if is_chat(item, tokenizer, template):
        if not getattr(tokenizer, "chat_template", None):
            raise refuse("USAGE", "the tokenizer has no chat template", wanted="--template alpaca or plain")
        return chat(item, tokenizer, add_generation_prompt=True)
    if any(turn.role in ("user", "assistant") for turn in item.before):
        wanted = "a tokenizer with a chat template"
        raise refuse("BAD_DATA", "a conversation needs a chat template", file=item.prompt[:40], wanted=wanted)
    prompt = "\n\n".join([*(turn.text for turn in item.before if turn.text), item.prompt])
    return f"{prompt}\n" if template == "plain" else _ALPACA.format(prompt=prompt)


def is_chat(item: Item, tokenizer: Any, template: Template) -> bool:
    """Whether the chat template writes it."""
    written = bool(getattr(tokenizer, "chat_template", None)) and not item.bare
    return template == "chat" or (template == "auto" and written)


def chat(item: Item, tokenizer: Any, *answer: dict[str, str], add_generation_prompt: bool = False) -> str:
    """What the chat template makes of the conversation up to the prompt, and of an answer."""
    turns = [{"role": turn.role, "content": turn.text} for turn in item.before]
    turns += [{"role": "user", "content": item.prompt}, *answer]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":  # whose templates raise what they do not take
            raise
        raise refuse("BAD_DATA", f"the chat template refuses it: {error}", file=item.prompt[:40]) from None


def encode(asked: Item | str, tokenizer: Any, template: Template = "auto") -> list[int]:
    """The tokens of `render`. A chat template writes the special tokens itself; they are not added a second time."""
    item = asked if isinstance(asked, Item) else Item(asked, "")
    text = render(item, tokenizer, template)
    return list(tokenizer(text, add_special_tokens=not is_chat(item, tokenizer, template))["input_ids"])
