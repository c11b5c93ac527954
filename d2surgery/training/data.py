"""Items become rows of tokens: which are trained on and which held out, in which order, and where the loss is.

    prompt tokens        answer tokens      end of the turn
    label −100           their own          its own

The loss is on the answer and on the end that stops generation. An answer is never cut, and neither is what the
template puts around the question: an item that is too long loses the beginning of its question, and one that does not
fit without any is left out; both are counted.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from itertools import count as naturals
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from d2surgery.errors import refuse
from d2surgery.evaluating.forms import Item
from d2surgery.evaluating.items import Template, chat, encode, is_chat, read_entries, render
from d2surgery.training.settings import Batching, DataSettings

IGNORED = -100
"""The label of a token that has no part in the loss, in torch and transformers."""
POOL = 50
"""Batches whose rows are sorted by length together: enough to pad little, few enough to stay random."""


class Encoded(NamedTuple):
    """An item as tokens; the last `answer` of them carry loss, or `answer` is the number of its label."""

    tokens: tuple[int, ...]
    answer: int
    name: str  # "boolq-train.json.gz, item 3"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on and held out, and what did not fit."""

    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    prompts_cut: int
    left_out: tuple[str, ...]  # names of items that are too long without their question
    labels: tuple[str, ...] = ()  # where these are learnt, in the order of the head's rows

    @property
    def digest(self) -> str:
        """sha256 of every token in its order."""
        parts = [[[*item.tokens, item.answer] for item in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_corpus(settings: DataSettings, tokenizer: Any, seed: int) -> Corpus:
    """The items of the files, drawn under the seed, as tokens. An item that is held out is never trained on.

    Raises what read_items raises, and BAD_DATA when nothing is left to train on or to hold out.
    """
    generator = torch.Generator().manual_seed(seed)
    train: list[tuple[str, Item]] = []
    held_out: list[tuple[str, Item]] = []
    for file in settings.train:
        drawn = _drawn(file, generator)
        aside = 0 if settings.held_out else min(settings.held_out_limit, len(drawn) // 2)
        held_out += drawn[:aside]
        train += drawn[aside : aside + settings.limit]
    for file in settings.held_out:
        held_out += _drawn(file, generator)[: settings.held_out_limit]
    labels = _labels(settings, [*train, *held_out]) if settings.goal == "labels" else ()
    asked = {item.opening for _, item in held_out}
    train = [(name, item) for name, item in train if item.opening not in asked]
    parts = [
        [each for name, item in part for each in _encoded(name, item, tokenizer, settings)]
        for part in (train, held_out)
    ]
    kept_train, kept_held_out = (tuple(item for item, _ in part if item.tokens) for part in parts)
    if not kept_train or (held_out and not kept_held_out):
        which = "train on" if not kept_train else "evaluate on"
        message = f"nothing to {which}: no item is left after limits, held-out items and max_length"
        raise refuse("BAD_DATA", message, file=", ".join(settings.train))
    every = [*parts[0], *parts[1]]
    return Corpus(
        train=kept_train,
        held_out=kept_held_out,
        prompts_cut=sum(cut for item, cut in every if item.tokens),
        left_out=tuple(item.name for item, _ in every if not item.tokens),
        labels=labels,
    )


Row = tuple[int, ...]
"""The items of a row by their number; more than one where rows are packed."""


def rows(
    items: Sequence[Encoded],
    *,
    batching: Batching,
    max_length: int,
    batch: int,
    seed: int,
    epochs: float | None = None,
    count: int | None = None,
) -> list[Row]:
    """The rows of a whole run, in order: so many epochs, or exactly `count` rows.

    The order depends on seed and epoch alone, so that a run resumes in the middle of it and several processes, each
    taking every n-th batch, see what one sees.
    """
    lengths = [len(item.tokens) for item in items]

    def epoch(number: int) -> list[Row]:
        generator = torch.Generator().manual_seed((seed << 20) + number + 1)
        order = torch.randperm(len(items), generator=generator).tolist()
        if batching == "packed":
            return _packed(order, lengths, max_length)
        if batching == "by_length":
            order = _by_length(order, lengths, batch, generator)
        return [(number,) for number in order]

    if count is not None:
        return list(islice(chain.from_iterable(map(epoch, naturals())), count))
    assert epochs is not None
    every = [epoch(number) for number in range(ceil(epochs))]
    share = epochs - (len(every) - 1)
    every[-1] = every[-1][: max(1, round(share * len(every[-1])))]
    return [*chain.from_iterable(every)]


class Rows(Dataset[list[Encoded]]):
    """A row at a time: its items."""

    def __init__(self, items: Sequence[Encoded], rows: Sequence[Row]) -> None:
        self.items = items
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> list[Encoded]:
        return [self.items[item] for item in self.rows[at]]


@dataclass(frozen=True)
class Collate:
    """Rows of items to the tensors of a batch, padded on the right.

    Packed rows have positions that begin again with each item and no mask: models of transformers tell items by that,
    and no item sees another. `names` stand beside for what has to be said about a batch; they are no tensors.
    """

    pad: int
    packed: bool
    labelled: bool = False
    answers_only: bool = False
    """Whether the model is told at which positions logits are needed: where any row's next token carries loss."""

    def __call__(self, batch: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
        if self.labelled:
            made = Collate(self.pad, packed=False)([[item._replace(answer=1)] for (item,) in batch])
            return made | {"labels": torch.tensor([item.answer for (item,) in batch])}
        width = max(sum(len(item.tokens) for item in row) for row in batch)
        tokens = torch.full((len(batch), width), self.pad)
        labels = torch.full_like(tokens, IGNORED)
        mask, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for at, row in enumerate(batch):
            start = 0
            for item in row:
                end = start + len(item.tokens)
                tokens[at, start:end] = torch.tensor(item.tokens)
                labels[at, end - item.answer : end] = tokens[at, end - item.answer : end]
                positions[at, start:end] = torch.arange(end - start)
                start = end
            mask[at, :start] = 1
            positions[at, start:] = torch.arange(width - start)  # padding is an item of its own
        names = tuple(item.name for row in batch for item in row)
        inputs = {"position_ids": positions} if self.packed else {"attention_mask": mask}
        inputs |= _answers(labels) if self.answers_only else {}
        return {"input_ids": tokens, "labels": labels, **inputs, "names": names}


def _answers(labels: Tensor) -> dict[str, Tensor]:
    """The positions before labels, and the labels that their logits predict: in transformers' names."""
    following = labels.roll(-1, 1)
    following[:, -1] = IGNORED
    keep = (following != IGNORED).any(0).nonzero()[:, 0]
    return {"logits_to_keep": keep, "shift_labels": following[:, keep].contiguous()}


def tokens_of(items: Sequence[Encoded], rows: Sequence[Row]) -> int:
    """Tokens in the rows, without padding."""
    return sum(len(items[item].tokens) for row in rows for item in row)


# Drawing ---------------------------------------------------------------------------------------------------------


def _drawn(file: str, generator: torch.Generator) -> list[tuple[str, Item]]:
    """A file's items with their names, in an order drawn under the seed."""
    entries = read_entries(file)
    order = torch.randperm(len(entries), generator=generator).tolist()
    return [
        (f"{Path(file).name}, item {at + 1}{f', answer {number}' if len(entries[at]) > 1 else ''}", item)
        for at in order
        for number, item in enumerate(entries[at], 1)
    ]


def _encoded(name: str, item: Item, tokenizer: Any, settings: DataSettings) -> Iterator[tuple[Encoded, bool]]:
    """The item as tokens, none where its answer does not fit; and whether its prompt was cut, of a text with a label at
    its end. A text without a question in as many pieces as it takes."""
    if settings.goal == "labels":
        tokens = list(tokenizer(item.prompt)["input_ids"])
        kept = list(tokenizer(item.prompt, truncation=True, max_length=settings.max_length)["input_ids"])
        yield Encoded(tuple(kept), item.choices.index(item.answer), name), len(kept) < len(tokens)
        return
    if not item.prompt:
        for piece in _pieces([*encode(item, tokenizer), *answer_tokens(item, tokenizer, "auto")], settings.max_length):
            yield Encoded(piece, len(piece) - 1, name), False
        return
    answer = answer_tokens(item, tokenizer, settings.template)
    prompt, whole = _fitting(item, settings.max_length - len(answer), tokenizer, settings.template)
    yield Encoded((*prompt, *answer) if prompt else (), len(answer), name), not whole


def _pieces(tokens: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """Each begins with the last token of the one before, so that every token but the first is predicted once."""
    for start in range(0, len(tokens) - 1, most - 1):
        yield tuple(tokens[start : start + most])


def _labels(settings: DataSettings, items: Sequence[tuple[str, Item]]) -> tuple[str, ...]:
    """The choices of every item. Raises BAD_DATA where they are not the same, in the same order."""
    labels = items[0][1].choices
    other = [name for name, item in items if item.choices != labels]
    if other or not labels:
        message = "labels are choices that all items share, in one order"
        raise refuse("BAD_DATA", message, file=", ".join(settings.train), got="; ".join(other[:8]) or "no choices")
    return labels


def _fitting(item: Item, room: int, tokenizer: Any, template: Template) -> tuple[list[int], bool]:
    """The prompt as far as there is room for it, and whether that is all; [] for no room. A conversation loses its
    first turns before its last question the beginning; neither loses what the system says."""
    shorter = _shorter(item)
    for number, one in enumerate(shorter):
        tokens = encode(one, tokenizer, template)
        if len(tokens) <= room:
            return tokens, number == 0
    one = shorter[-1]
    fits, does_not = len(one.prompt), 0  # characters left out
    tokens = encode(replace(one, prompt=""), tokenizer, template)
    if not tokens or len(tokens) > room:
        return [], True
    while fits - does_not > 1:
        middle = (fits + does_not) // 2
        less = encode(replace(one, prompt=one.prompt[middle:]), tokenizer, template)
        fits, does_not, tokens = (middle, does_not, less) if len(less) <= room else (fits, middle, tokens)
    return tokens, False


def _shorter(item: Item) -> list[Item]:
    """The item, and without its first turns: each begins with what the system says and a turn of the user."""
    start = next((at for at, turn in enumerate(item.before) if turn.role in ("user", "assistant")), len(item.before))
    system, said = item.before[:start], item.before[start:]
    begins = [at for at, turn in enumerate(said) if turn.role == "user" and at]
    rests = [said[at:] for at in begins] + [()] * bool(said)
    return [item, *(replace(item, before=(*system, *rest)) for rest in rests)]


def answer_tokens(item: Item, tokenizer: Any, template: Template) -> list[int]:
    """The answer and the end of the turn: the chat template's own end where it has one, else the end of text."""
    ids = list(tokenizer(item.answer, add_special_tokens=False)["input_ids"])
    end = _end_of_turn(item, tokenizer, template)
    if end:
        return ids + list(tokenizer(end, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]


def _end_of_turn(item: Item, tokenizer: Any, template: Template) -> str:
    """What the chat template puts after an answer, "" where it does not put the answer after the prompt."""
    if not is_chat(item, tokenizer, template) or not getattr(tokenizer, "chat_template", None):
        return ""
    whole = chat(item, tokenizer, {"role": "assistant", "content": item.answer})
    before = render(item, tokenizer, template) + item.answer
    return whole.removeprefix(before).rstrip() if whole.startswith(before) else ""


# Order -----------------------------------------------------------------------------------------------------------


def _packed(order: Sequence[int], lengths: Sequence[int], max_length: int) -> list[Row]:
    """Items in order, each into the first of the last rows it fits in."""
    open_rows: list[tuple[int, list[int]]] = []
    closed: list[Row] = []
    for item in order:
        at = next((i for i, (used, _) in enumerate(open_rows) if used + lengths[item] <= max_length), None)
        if at is None:
            open_rows.append((0, []))
            at = len(open_rows) - 1
        used, row = open_rows[at]
        open_rows[at] = (used + lengths[item], [*row, item])
        if len(open_rows) > POOL:
            closed.append(tuple(open_rows.pop(0)[1]))
    return [*closed, *(tuple(row) for _, row in open_rows)]


def _by_length(order: Sequence[int], lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """Within pools of batches sorted by length, then the batches shuffled: one batch has rows of like length."""
    pools = [order[at : at + POOL * batch] for at in range(0, len(order), POOL * batch)]
    ranked = [item for pool in pools for item in sorted(pool, key=lambda item: lengths[item])]
    batches = [ranked[at : at + batch] for at in range(0, len(ranked), batch)]
    whole, rest = (batches[:-1], batches[-1]) if len(batches[-1]) < batch else (batches, [])
    shuffled = torch.randperm(len(whole), generator=generator).tolist()
    return [*chain.from_iterable(whole[at] for at in shuffled), *rest]
