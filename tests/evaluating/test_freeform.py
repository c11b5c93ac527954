"""Words against words, and labels against labels: by hand, and by the libraries where they are installed."""

import math
import random
from pathlib import Path

import pytest
import torch
from models import byte_tokenizer, llama

from d2surgery.evaluating.forms import Item
from d2surgery.evaluating.freeform import answers, class_f1, exact_match, macro_f1, matthews, rouge_l, token_f1

PAIRS = [  # text, wanted, exact, F1, ROUGE-L: counted by hand
    ("The cat sat.", "the cat sat", True, 1.0, 1.0),
    ("a cat", "the cat", True, 1.0, 0.5),  # articles count in ROUGE-L
    ("cat sat on a mat", "the mat sat", False, 2 * 2 / (4 + 2), 2 * 1 / (5 + 3)),
    ("", "", True, 1.0, 0.0),
    ("...", "dog", False, 0.0, 0.0),
    ("police killed the gunman", "police kill the gunman", False, 2 * 2 / (3 + 3), 2 * 3 / (4 + 4)),  # Lin's example
]

WORDS = ["a", "the", "cat", "Sat", "on-a", "mat,", "dog", "7"]


@pytest.mark.parametrize(("text", "wanted", "exact", "f1", "rouge"), PAIRS)
def test_words_are_compared_as_squad_and_rouge_do(text: str, wanted: str, exact: bool, f1: float, rouge: float) -> None:
    assert exact_match(text, wanted) is exact
    assert token_f1(text, wanted) == pytest.approx(f1)
    assert rouge_l(text, wanted) == pytest.approx(rouge)


def test_rouge_l_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    theirs = scorer.RougeScorer(["rougeL"])
    draw = random.Random(0)
    for _ in range(200):
        one, other = (" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in "12")
        assert rouge_l(one, other) == pytest.approx(theirs.score(other, one)["rougeL"].fmeasure)


def test_labels_are_compared_as_by_hand() -> None:
    """tp 3, fp 1, fn 2, tn 4: MCC = (12 − 2)/√(4·5·5·6), F1 = 6/9."""
    gold, picked = [1] * 5 + [0] * 5, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert matthews(gold, picked) == pytest.approx(10 / math.sqrt(600))
    assert class_f1(gold, picked, 1) == pytest.approx(6 / 9)
    assert macro_f1(gold, picked) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert matthews(gold, [1] * 10) == 0
    assert matthews(gold, gold) == 1
    assert matthews([0, 1], [1, 0]) == -1
    assert matthews([0, 1, 1], [0, 1, None]) == matthews([0, 1, 1], [0, 1, 2])


def test_labels_are_compared_as_sklearn_does() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = random.Random(0)
    for classes in (2, 3, 5):
        gold, picked = ([draw.randrange(classes) for _ in range(40)] for _ in "12")
        assert matthews(gold, picked) == pytest.approx(metrics.matthews_corrcoef(gold, picked))
        assert macro_f1(gold, picked) == pytest.approx(metrics.f1_score(gold, picked, average="macro"))


def test_perplexity_is_of_the_answers_tokens(tmp_path: Path) -> None:
    """Against the model's own loss, item by item; intervals hold their means."""
    torch.manual_seed(0)
    model, tokenizer = llama(vocab_size=258, max_position_embeddings=256).eval(), byte_tokenizer()
    items = [Item("one and one?", "two"), Item("the colour of snow?", "white it is"), Item("why?", "x")]
    found = answers(model, tokenizer, items, template="plain")
    total, count = 0.0, 0
    for item in items:
        prompt = tokenizer(f"{item.prompt}\n")["input_ids"]
        answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * len(answer)
        count += len(answer)
    assert found.nats == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.nats_ci[0] <= found.nats <= found.nats_ci[1]
    assert len(found.texts) == len(found.of_items) == 3
