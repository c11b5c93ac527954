"""Answers in a model's own words, and labels: how near they come to the right ones.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016), ROUGE-L that of Lin 2004 on lower-cased words, Matthews'
correlation that of CoLA. Perplexity is exp of the mean nats per token of the right answers.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from d2surgery.errors import brief, refuse
from d2surgery.evaluating.forms import Item
from d2surgery.evaluating.items import Template, encode
from d2surgery.evaluating.paired import DRAWS, Interval, percentile_interval
from d2surgery.evaluating.tasks import BATCH_TOKENS, Progress, generate, log_likelihoods, silent

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Means over items with their 95 % bootstrap intervals; per item what they are means of."""

    nats: float
    """Per token of the right answers, all items together."""
    nats_ci: Interval
    exact: float
    exact_ci: Interval
    f1: float
    f1_ci: Interval
    rouge_l: float
    rouge_l_ci: Interval
    texts: tuple[str, ...]
    of_items: tuple[dict[str, float], ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def answers(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    template: Template = "auto",
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    seed: int = 0,
) -> Answers:
    """What a model says to each item, against its answer. progress(done, total) counts items, each twice."""
    if text := next((item for item in items if not item.prompt), None):
        raise refuse("BAD_DATA", "a text that nobody asks for has no answer", got=brief(text.answer))
    prompts = [encode(item, tokenizer, template) for item in items]
    wanted = [[list(tokenizer(item.answer, add_special_tokens=False)["input_ids"])] for item in items]
    total = 2 * len(items)
    sums = log_likelihoods(model, prompts, wanted, batch_tokens, lambda done: progress(done, total))
    texts = generate(model, tokenizer, prompts, batch_tokens, lambda done: progress(len(items) + done, total))
    of_items = [
        {
            "nats": -value, "tokens": len(tokens), "exact": float(exact_match(text, item.answer)),
            "f1": token_f1(text, item.answer), "rouge_l": rouge_l(text, item.answer),
        }
        for (value,), (tokens,), text, item in zip(sums, wanted, texts, items, strict=True)
    ]  # fmt: skip
    nats, exact, f1, rouge = (_mean(of_items, name, seed) for name in ("nats", "exact", "f1", "rouge_l"))
    return Answers(
        nats=nats[0], nats_ci=nats[1], exact=exact[0], exact_ci=exact[1], f1=f1[0], f1_ci=f1[1],
        rouge_l=rouge[0], rouge_l_ci=rouge[1], texts=tuple(texts), of_items=tuple(of_items),
    )  # fmt: skip


def exact_match(text: str, wanted: str) -> bool:
    """Without case, punctuation, articles and repeated spaces."""
    return _plain(text) == _plain(wanted)


def token_f1(text: str, wanted: str) -> float:
    """2PR/(P + R) of the words that both have; of two empty texts 1."""
    one, other = _plain(text).split(), _plain(wanted).split()
    if not one or not other:
        return float(one == other)
    return _f1(sum((Counter(one) & Counter(other)).values()), len(one), len(other))


def rouge_l(text: str, wanted: str) -> float:
    """2PR/(P + R) of the longest common subsequence of words; 0 where either has none."""
    one, other = _WORD.findall(text.lower()), _WORD.findall(wanted.lower())
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for at, (left, above) in enumerate(pairwise(before)):
            row.append(left + 1 if word == other[at] else max(above, row[-1]))
    return _f1(row[-1], len(one), len(other))


def matthews(gold: Sequence[int], picked: Sequence[int | None]) -> float:
    """Correlation of two labellings, −1 to 1, of any number of classes (Gorodkin 2004); 0 where one is constant."""
    labels = sorted({*gold, *(label for label in picked if label is not None), -1})
    table = np.zeros((len(labels), len(labels)))
    for right, chosen in zip(gold, picked, strict=True):
        table[labels.index(right), labels.index(-1 if chosen is None else chosen)] += 1
    rows, columns, total = table.sum(1), table.sum(0), table.sum()
    spread = math.sqrt((total**2 - rows @ rows) * (total**2 - columns @ columns))
    return float((np.trace(table) * total - rows @ columns) / spread) if spread else 0.0


def class_f1(gold: Sequence[int], picked: Sequence[int | None], label: int) -> float:
    """2PR/(P + R) of one class; 0 where it is neither right nor chosen."""
    both = sum(right == chosen == label for right, chosen in zip(gold, picked, strict=True))
    return _f1(both, sum(right == label for right in gold), sum(chosen == label for chosen in picked))


def macro_f1(gold: Sequence[int], picked: Sequence[int | None]) -> float:
    """The mean of `class_f1` over the classes that are right of some item."""
    return float(np.mean([class_f1(gold, picked, label) for label in sorted(set(gold))]))


def _mean(of_items: Sequence[dict[str, float]], name: str, seed: int) -> tuple[float, Interval]:
    """Of items, nats of tokens; with the interval of resampled items."""
    values = np.array([record[name] for record in of_items])
    counts = np.array([record["tokens"] if name == "nats" else 1 for record in of_items])
    generator = np.random.default_rng(seed)
    rows = (generator.integers(len(values), size=len(values)) for _ in range(DRAWS))  # not all of them at once
    draws = np.array([values[row].sum() / counts[row].sum() for row in rows])
    return float(values.sum() / counts.sum()), percentile_interval(draws, 0.95)


def _f1(both: int, one: int, other: int) -> float:
    return 2 * both / (one + other) if one + other else 0.0


def _plain(text: str) -> str:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", bare).split())
