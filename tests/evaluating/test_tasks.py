"""Multiple-choice accuracy: against one forward per choice without any batching, and a greedy loop by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from models import byte_tokenizer, llama, scatter

from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.forms import Item
from d2surgery.evaluating.items import WAYS, Task, encode, read_task
from d2surgery.evaluating.tasks import (
    NEW_TOKENS,
    Score,
    generate,
    log_likelihoods,
    named_choice,
    score,
)

TOKENIZER = byte_tokenizer()


def built(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = make()
    scatter(model)
    return model.eval()


def mamba() -> Any:
    return T.MambaForCausalLM(T.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=258))


def small_gpt2() -> Any:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=258, n_positions=512, **special))


def small_llama() -> Any:
    return llama(vocab_size=258, max_position_embeddings=512)


MODELS = {"llama": small_llama, "gpt2": small_gpt2, "mamba": mamba}
LLAMA = built(MODELS["llama"])


def by_hand(model: Any, prompt: list[int], choice: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + choice])).logits[0].double()
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(sum(steps[at, token] for at, token in enumerate(choice)))


tokens = st.lists(st.integers(0, 257), min_size=1, max_size=9)
questions = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20)
@given(asked=questions, batch_tokens=st.sampled_from([1, 30, 4096]))
def test_likelihoods_are_those_of_one_forward_each(name: str, asked: Any, batch_tokens: int) -> None:
    model = CACHE.setdefault(name, built(MODELS[name]))
    prompts, choices = [list(part) for part in zip(*asked, strict=True)]
    found = log_likelihoods(model, prompts, choices, batch_tokens)
    for prompt, some, values in zip(prompts, choices, found, strict=True):
        assert values == pytest.approx([by_hand(model, prompt, choice) for choice in some], abs=1e-4)


CACHE: dict[str, Any] = {}


def test_choices_that_differ_in_their_last_token_share_one_forward() -> None:
    rows: list[int] = []
    hook = LLAMA.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    log_likelihoods(LLAMA, [[1, 2, 3]], [[[5, 6], [5, 7], [5, 8], [6, 8]]])
    hook.remove()
    assert sum(rows) == 2


def test_only_the_logits_that_predict_a_choice_are_kept() -> None:
    sizes: list[int] = []
    hook = LLAMA.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    log_likelihoods(LLAMA, [list(range(100))], [[[5, 6], [7, 8]]])
    hook.remove()
    assert sizes == [2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_is_the_greedy_loop(name: str) -> None:
    model = CACHE.setdefault(name, built(MODELS[name]))
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=1.5)  # a model's own habits
    prompts = [encode(text, TOKENIZER, "plain") for text in ("Why?", "A longer question, with a comma", "x")]
    ends = model.generation_config.eos_token_id
    ends = TOKENIZER.eos_token_id if ends is None else ends
    wanted = []
    for prompt in prompts:
        said: list[int] = []
        while len(said) < NEW_TOKENS and (not said or said[-1] != ends):
            with torch.no_grad():
                said.append(int(model(input_ids=torch.tensor([prompt + said])).logits[0, -1].argmax()))
        wanted.append(TOKENIZER.decode(said, skip_special_tokens=True))
    assert generate(model, TOKENIZER, prompts, batch_tokens=60) == wanted


# What an answer names --------------------------------------------------------------------------------------------

COMMONSENSE = tuple(f"the correct answer is answer{n}" for n in (1, 2, 10))
NAMED = [  # (text, choices, which)
    ("the correct answer is answer2", COMMONSENSE, 1),
    ("Answer10: because answer1 is wrong", COMMONSENSE, 2),
    ("ANSWER1.", COMMONSENSE, 0),
    ("answer11", COMMONSENSE, None),
    ("the correct answer is", COMMONSENSE, None),
    ("", COMMONSENSE, None),
    ("It is false, not true", ("true", "false"), 1),
    ("untrue", ("true", "false"), None),
    ("New  York\nof course", ("York", "New York"), 1),
    ("c++ (of course)", ("c", "c++"), 1),
    ("b", ("B", "b"), 1),
    ("say yes", ("say", "say yes"), 1),
]


@pytest.mark.parametrize(("text", "choices", "which"), NAMED)
def test_the_choice_that_is_named_first(text: str, choices: tuple[str, ...], which: int | None) -> None:
    assert named_choice(text, choices) == which


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, unique_by=lambda t: " ".join(t.split()).casefold()))
def test_any_choices_can_be_asked_for(choices: list[str]) -> None:
    assert named_choice("", choices) is None
    found = named_choice(choices[0], choices)
    assert found is None or 0 <= found < len(choices)


# Scores ----------------------------------------------------------------------------------------------------------

TASK = Task(
    "colours",
    (
        Item("Sky?", "it is blue", ("it is blue", "it is red")),
        Item("Blood?", "it is red", ("it is blue", "it is red", "it is a dark green")),
    ),
)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_a_score_keeps_what_every_item_got(batch_tokens: int) -> None:
    steps: list[tuple[int, int]] = []
    found = score(
        LLAMA, TOKENIZER, TASK, by=WAYS, template="plain", batch_tokens=batch_tokens,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert list(found) == list(WAYS)
    values = found["likelihood"].log_likelihoods
    for item, numbers in zip(TASK.items, values, strict=True):
        prompt = encode(item.prompt, TOKENIZER, "plain")
        wanted = [by_hand(LLAMA, prompt, TOKENIZER(c, add_special_tokens=False)["input_ids"]) for c in item.choices]
        assert numbers == pytest.approx(wanted, abs=1e-3)
    picked = [max(range(len(v)), key=v.__getitem__) for v in values]
    per_byte = [
        [v / len(c) for v, c in zip(vs, i.choices, strict=True)] for vs, i in zip(values, TASK.items, strict=True)
    ]
    assert found["likelihood"].picked == tuple(picked)
    assert found["normalised"].picked == tuple(max(range(len(v)), key=v.__getitem__) for v in per_byte)
    assert found["likelihood"].gold == (0, 1)
    assert found["likelihood"].correct == sum(p == g for p, g in zip(picked, (0, 1), strict=True))
    assert len(found["generation"].texts) == 2
    assert steps[-1] == (4, 4)
    assert steps == sorted(steps)


def test_numbers_that_are_none_are_no_answer() -> None:
    broken = built(MODELS["llama"])
    broken.lm_head.weight.data.fill_(float("nan"))
    found = score(broken, TOKENIZER, TASK)["likelihood"]
    assert found.picked == (None, None)
    assert (found.accuracy, found.unanswered) == (0.0, 2)


def test_what_does_not_fit_the_model_is_named() -> None:
    long = Task("long", (*TASK.items, Item("x" * 600, "a", ("a", "b"))))
    with pytest.raises(D2SurgeryError, match=r"longer than the model's context of 512 tokens .*items 3"):
        score(LLAMA, TOKENIZER, long)
    small = built(lambda: llama(vocab_size=100))
    with pytest.raises(D2SurgeryError, match="NOT_RUNNABLE colours: the tokenizer has tokens beyond the model's 100"):
        score(small, TOKENIZER, TASK)


# Files -----------------------------------------------------------------------------------------------------------


def questions_file(path: Path, count: int) -> Path:
    rows = [{"question": f"{n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_limit_takes_items_evenly(tmp_path: Path) -> None:
    path = questions_file(tmp_path / "set-test.jsonl", 10)
    assert read_task(path).name == "set-test"
    assert [item.prompt for item in read_task(path, 4).items] == ["0?", "2?", "5?", "7?"]
    assert read_task(path, 99) == read_task(path)


def test_items_without_choices_are_no_task(tmp_path: Path) -> None:
    path = tmp_path / "free.json"
    path.write_text(json.dumps([{"question": "1?", "answer": "a"}, {"question": "2?", "answer": "a"}]))
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA .*nothing to choose between.*items 1, 2"):
        read_task(path)


def test_tasks_and_scores_print_in_a_line() -> None:
    task = Task("even", (Item("Is 2 even?", "yes", ("yes", "no")),) * 500)
    assert repr(task) == "Task('even', 500 items)"
    found = Score(task="even", by="likelihood", gold=(0,) * 500, picked=(0, None) * 250, chance=0.5)
    assert repr(found) == "Score('even' by likelihood: 250 of 500 right)"
