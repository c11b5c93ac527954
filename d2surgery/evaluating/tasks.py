"""Multiple-choice accuracy of a causal language model, by the likelihood of each choice and by what it generates."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2surgery.errors import Problem, raise_errors
from d2surgery.evaluating.items import By, Task, Template, encode
from d2surgery.evaluating.paired import Interval, wilson

BATCH_TOKENS = 4096
NEW_TOKENS = 32

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Score:
    """What a model chose on each item of a task; None where it named no choice or its numbers are not numbers."""

    task: str
    by: str  # one of WAYS, or the metric of a harness
    gold: tuple[int, ...]
    picked: tuple[int | None, ...]
    chance: float | None  # the accuracy of guessing, 0 to 1; None where not known
    log_likelihoods: tuple[tuple[float, ...], ...] = ()  # of each choice, in nats
    texts: tuple[str, ...] = ()  # what was generated

    def __repr__(self) -> str:
        return f"Score({self.task!r} by {self.by}: {self.correct} of {len(self.gold)} right)"

    @cached_property
    def correct(self) -> int:
        return sum(a == b for a, b in zip(self.gold, self.picked, strict=True))

    @property
    def accuracy(self) -> float:
        """0 to 1."""
        return self.correct / len(self.gold)

    @property
    def interval(self) -> Interval:
        """Wilson's, 95 %."""
        return wilson(self.correct, len(self.gold))

    @property
    def unanswered(self) -> int:
        return sum(choice is None for choice in self.picked)


def score(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    by: Sequence[By] = ("likelihood",),
    template: Template = "auto",
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[By, Score]:
    """What the model chooses on every item, in each of the ways asked for. progress(done, total) counts items.

    A batch holds about `batch_tokens` tokens; logits are kept of the positions that predict a choice only. Raises
    D2SurgeryError BAD_DATA for items longer than the model's context, NOT_RUNNABLE for tokens it does not have.
    """
    gold = tuple(item.choices.index(item.answer) for item in task.items)
    chance = sum(1 / len(item.choices) for item in task.items) / len(task.items)
    same: dict[str, Any] = {"task": task.name, "gold": gold, "chance": chance}
    prompts = [encode(item, tokenizer, template) for item in task.items]
    choices = [[_tokens(tokenizer, choice) for choice in item.choices] for item in task.items]
    _check(model, task, prompts, choices)
    total = _rounds(by) * len(task.items)
    found: dict[By, Score] = {}
    if set(by) - {"generation"}:
        values = log_likelihoods(model, prompts, choices, batch_tokens, lambda done: progress(done, total))
        lengths = [[len(choice.encode()) for choice in item.choices] for item in task.items]
        per_byte = [[v / n for v, n in zip(*pair, strict=True)] for pair in zip(values, lengths, strict=True)]
        ways: dict[By, list[list[float]]] = {"likelihood": values, "normalised": per_byte}
        for way, numbers in ways.items():
            if way in by:
                picked = tuple(map(_largest, numbers))
                kept = tuple(map(tuple, values))
                found[way] = Score(by=way, picked=picked, log_likelihoods=kept, **same)
    if "generation" in by:
        before = total - len(task.items)
        texts = generate(model, tokenizer, prompts, batch_tokens, lambda done: progress(before + done, total))
        named = tuple(named_choice(text, item.choices) for text, item in zip(texts, task.items, strict=True))
        found["generation"] = Score(by="generation", picked=named, texts=tuple(texts), **same)
    return {way: found[way] for way in by}


def score_all(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    by: Sequence[By] = ("likelihood",),
    template: Template = "auto",
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[Score]:
    """The scores of several tasks, task by task, way by way."""
    total = _rounds(by) * sum(len(task.items) for task in tasks)
    scores: list[Score] = []
    before = 0
    for task in tasks:

        def told(done: int, _: int, before: int = before) -> None:
            progress(before + done, total)

        found = score(model, tokenizer, task, by=by, template=template, batch_tokens=batch_tokens, progress=told)
        scores += found.values()
        before += _rounds(by) * len(task.items)
    return scores


def log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Σ_t log p(choice_t | prompt, choice_<t) of each choice of each item, in float32 at least.

    Choices that differ in their last token only share one forward: "… answer1" and "… answer2" cost one, not two.
    """
    rows = _rows(prompts, choices)
    left = [len(some) for some in choices]
    found = [[0.0] * len(some) for some in choices]
    done = 0
    for batch in _batches(rows, batch_tokens):
        for row, logits in zip(batch, _logits(model, batch), strict=True):
            log_p = logits.log_softmax(-1)
            for item, choice in row.places:
                target = torch.tensor(choices[item][choice], device=log_p.device)
                found[item][choice] = float(log_p.gather(1, target[:, None]).sum(dtype=torch.float64))
                left[item] -= 1
                done += not left[item]
        progress(done)
    return found


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's own continuation of each prompt: greedy, up to NEW_TOKENS tokens or its end of text."""
    from transformers import GenerationConfig

    living: Any = model
    ends = living.generation_config.eos_token_id
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0, no_repeat_ngram_size=0,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends, pad_token_id=pad,
    )  # fmt: skip
    texts = [""] * len(prompts)
    done = 0
    for batch in _batches([_Row(tuple(ids), 0, [(at, 0)]) for at, ids in enumerate(prompts)], batch_tokens):
        width = max(len(row.tokens) for row in batch)
        padded = [[pad] * (width - len(row.tokens)) + list(row.tokens) for row in batch]
        mask = [[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in batch]
        device = living.device
        inputs = {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}
        new = living.generate(**inputs, generation_config=config)[:, width:]
        for row, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[row.places[0][0]] = text
        done += len(batch)
        progress(done)
    return texts


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """The choice whose own words come first in a text, whole words, in any case; None if none does.

    Its own words are what remains after the words that all choices begin with: "answer2" of "the correct answer is
    answer2".
    """
    words = [choice.split() for choice in choices]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))
    shared = min(shared, *(len(own) - 1 for own in words))  # each keeps a word of its own
    labels = [" ".join(own[shared:]) for own in words]
    folded = [label.casefold() for label in labels]
    flags = re.IGNORECASE if len(set(folded)) == len(folded) else re.NOFLAG
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    found = re.search(pattern, " ".join(text.split()), flags)
    if found is None:
        return None
    return labels.index(found[1]) if found[1] in labels else folded.index(found[1].casefold())


# Batches ---------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One input of the model; the logits from position `first` on predict the tokens of the choices at `places`."""

    tokens: tuple[int, ...]
    first: int
    places: list[tuple[int, int]]  # (item, choice)


def _rows(prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]) -> list[_Row]:
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for item, (prompt, some) in enumerate(zip(prompts, choices, strict=True)):
        for at, choice in enumerate(some):
            tokens = (*prompt, *choice[:-1])
            rows.setdefault((item, tokens), _Row(tokens, len(prompt) - 1, [])).places.append((item, at))
    return list(rows.values())


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """The longest first, so that what does not fit fails at once; rows of like length together."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _logits(model: nn.Module, batch: Sequence[_Row]) -> list[Tensor]:
    """Each row's logits from its `first` position to its end. Padding follows the tokens, which do not see it."""
    width = max(len(row.tokens) for row in batch)
    device = next(model.parameters()).device
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in batch], device=device)
    mask = torch.tensor([[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in batch], device=device)
    needed = sorted({at for row in batch for at in range(row.first, len(row.tokens))})
    only: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        only = {"logits_to_keep": torch.tensor(needed, device=device)}
    else:
        needed = list(range(width))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **only).logits
    place = {position: at for at, position in enumerate(needed)}
    spans = [torch.tensor([place[at] for at in range(row.first, len(row.tokens))], device=device) for row in batch]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return [logits[at, span].to(wide) for at, span in enumerate(spans)]


def _rounds(by: Sequence[By]) -> int:
    """How often a model goes through the items: once for all likelihoods, once to generate."""
    return ("generation" in by) + bool({*by} - {"generation"})


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _largest(numbers: Sequence[float]) -> int | None:
    return None if any(map(isnan, numbers)) else max(range(len(numbers)), key=numbers.__getitem__)


def _check(
    model: nn.Module, task: Task, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
) -> None:
    """Every item fits the model: its context, its vocabulary; no choice is without tokens."""
    living: Any = model
    text = living.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    known = living.get_input_embeddings().weight.shape[0]
    empty, long, unknown = [], [], []
    for number, (prompt, some) in enumerate(zip(prompts, choices, strict=True), 1):
        empty += [number] * (not prompt or not all(some))
        long += [number] * (context is not None and len(prompt) + max(map(len, some)) > context)
        unknown += [number] * any(token >= known for tokens in (prompt, *some) for token in tokens)
    problems: Mapping[str, tuple[str, list[int], str]] = {
        "empty": ("BAD_DATA", empty, "a prompt or choice has no tokens"),
        "long": ("BAD_DATA", long, f"longer than the model's context of {context} tokens"),
        "unknown": ("NOT_RUNNABLE", unknown, f"the tokenizer has tokens beyond the model's {known}"),
    }
    raise_errors(
        Problem(code=code, message=message, file=task.name, got=f"items {', '.join(map(str, numbers[:8]))}")
        for code, numbers, message in problems.values()
        if numbers
    )
