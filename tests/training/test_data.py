"""Items as rows: where the loss is, what is cut, what is held out, in which order."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer, llama, scatter
from trained import CHAT

from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.forms import Item
from d2surgery.training.data import IGNORED, Collate, Corpus, Encoded, answer_tokens, read_corpus, rows, tokens_of
from d2surgery.training.settings import Batching, DataSettings

TOKENIZER = byte_tokenizer()


def chatting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, pairs: Sequence[tuple[str, str]]) -> str:
    path.write_text(json.dumps([{"question": question, "answer": answer} for question, answer in pairs]))
    return str(path)


def corpus(tmp_path: Path, pairs: Sequence[tuple[str, str]], tokenizer: Any = TOKENIZER, **options: Any) -> Corpus:
    chosen = {"template": "plain", "held_out_limit": 0, **options}
    return read_corpus(DataSettings(train=(write(tmp_path / "items.json", pairs),), **chosen), tokenizer, seed=0)


def read_back(batch: dict[str, Any], tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    """What each row says, and what of it carries loss."""
    pairs = zip(batch["input_ids"], batch["labels"], strict=True)
    return [(tokenizer.decode(ids), tokenizer.decode(labels[labels != IGNORED])) for ids, labels in pairs]


# Where the loss is -----------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_answer_and_the_end_of_text(tmp_path: Path) -> None:
    found = corpus(tmp_path, [("2 and 2?", "four"), ("1?", "one")])
    batch = Collate(257, packed=False)([[item] for item in found.train])
    assert sorted(read_back(batch)) == [
        ("<s>1?\none</s>" + "</s>" * 7, "one</s>"),
        ("<s>2 and 2?\nfour</s>", "four</s>"),
    ]
    lengths = (batch["input_ids"] != 257).sum(1) + 1
    assert torch.equal(batch["attention_mask"].sum(1), lengths)


def test_a_chat_template_ends_the_turn_itself(tmp_path: Path) -> None:
    """The answer is followed by what the template puts there, and not by the end of text."""
    found = corpus(tmp_path, [("2?", "two")], chatting(), template="auto")
    (pair,) = read_back(Collate(257, packed=False)([list(found.train)]))
    assert pair == ("<user>2?<end>\n<assistant>two<end>", "two<end>")


def test_a_template_that_puts_the_answer_elsewhere_ends_with_the_end_of_text() -> None:
    plain = byte_tokenizer(chat=True)  # <s> stands before each turn, also before the answer
    assert plain.decode(answer_tokens(Item("2?", "two"), plain, "chat")) == "two</s>"


def test_a_long_item_loses_the_beginning_of_its_question_and_neither_answer_nor_template(tmp_path: Path) -> None:
    pairs = [("a long question?", "yes"), ("q?", "no"), ("why?", "because it is so")]
    found = corpus(tmp_path, pairs, max_length=10)
    said = sorted(read_back(Collate(257, packed=False)([[item] for item in found.train])))
    assert said == [("<s>ion?\nyes</s>", "yes</s>"), ("<s>q?\nno</s>" + "</s>" * 3, "no</s>")]
    assert found.prompts_cut == 1
    assert found.left_out == ("items.json, item 3",)


def test_a_cut_question_keeps_the_header_of_a_chat(tmp_path: Path) -> None:
    found = corpus(tmp_path, [("a long question, which is cut?", "yes")], chatting(), template="auto", max_length=40)
    ((said, _),) = read_back(Collate(257, packed=False)([list(found.train)]))
    assert said == "<user>h is cut?<end>\n<assistant>yes<end>"
    assert found.prompts_cut == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA .*nothing to train on"):
        corpus(tmp_path, [("q", "an answer")], max_length=4)


# Conversations and texts -----------------------------------------------------------------------------------------

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 and 2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "seven"},
]
MARKED = (  # as CHAT, and what the assistant writes is marked as transformers asks for it
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<end>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<end>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def file_of(tmp_path: Path, *values: Any) -> str:
    (tmp_path / "data.json").write_text(json.dumps(values))
    return str(tmp_path / "data.json")


def of_file(file: str, tokenizer: Any = TOKENIZER, **options: Any) -> Corpus:
    chosen = {"held_out_limit": 0, **options}
    return read_corpus(DataSettings(train=(file,), **chosen), tokenizer, seed=0)


def test_a_conversation_carries_loss_where_the_assistant_speaks_each_turn_once(tmp_path: Path) -> None:
    """transformers' own mask of the assistant's tokens is the reference."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MARKED
    found = of_file(file_of(tmp_path, {"messages": SAID}), tokenizer).train
    whole = tokenizer.apply_chat_template(SAID, return_dict=True, return_assistant_tokens_mask=True)
    assert [item.name for item in found] == ["data.json, item 1, answer 1", "data.json, item 1, answer 2"]
    mask = [0] * len(whole["input_ids"])
    for item in found:
        assert list(item.tokens) == whole["input_ids"][: len(item.tokens)]
        for at in range(len(item.tokens) - item.answer, len(item.tokens)):
            mask[at] += 1
    assert mask == whole["assistant_masks"]


def test_a_long_conversation_loses_its_first_turns_and_not_what_the_system_says(tmp_path: Path) -> None:
    found = of_file(file_of(tmp_path, {"messages": SAID}), chatting(), max_length=66)
    said = {TOKENIZER.decode(item.tokens) for item in found.train}
    assert said == {
        "<system>Be brief.<end>\n<user>2 and 2?<end>\n<assistant>four<end>",
        "<system>Be brief.<end>\n<user>and 3?<end>\n<assistant>seven<end>",
    }
    assert (found.prompts_cut, found.left_out) == (1, ())


def test_a_conversation_is_held_out_whole(tmp_path: Path) -> None:
    talks = [{"messages": [turn | {"content": f"{n}: {turn['content']}"} for turn in SAID]} for n in range(20)]
    found = of_file(file_of(tmp_path, *talks), chatting(), held_out_limit=7, max_length=200)
    parts = [{item.name.rpartition(",")[0] for item in part} for part in (found.train, found.held_out)]
    assert len(found.held_out) == 7
    assert not parts[0] & parts[1]
    assert len(found.train) == 2 * (20 - 4)


def test_without_a_chat_template_a_system_may_speak_and_nobody_else(tmp_path: Path) -> None:
    found = of_file(file_of(tmp_path, {"messages": SAID[:3]}), template="plain")
    assert TOKENIZER.decode(found.train[0].tokens) == "<s>Be brief.\n\n2 and 2?\nfour</s>"
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA and 3\?: a conversation needs a chat template"):
        of_file(file_of(tmp_path, {"messages": SAID}), template="plain")


def test_what_a_chat_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA 2 and 2\?: the chat template refuses it: System role not"):
        of_file(file_of(tmp_path, {"messages": SAID[:3]}), tokenizer)


def test_a_completion_follows_its_prompt_as_it_is_written(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"prompt": "def f", "completion": "(): ..."})
    (pair,) = read_back(Collate(257, packed=False)([list(of_file(file, chatting()).train)]))
    assert pair == ("<s>def f(): ...</s>", "(): ...</s>")
    (pair,) = read_back(Collate(257, packed=False)([list(of_file(file, chatting(), template="chat").train)]))
    assert pair == ("<user>def f<end>\n<assistant>(): ...<end>", "(): ...<end>")


@given(st.text("abc ", min_size=1, max_size=60).filter(str.strip), st.integers(2, 20))
def test_every_token_of_a_text_but_the_first_is_predicted_once(text: str, most: int) -> None:
    with TemporaryDirectory() as folder:
        found = of_file(file_of(Path(folder), {"text": text}), max_length=most).train
    whole = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    assert [token for item in found for token in item.tokens[len(item.tokens) - item.answer :]] == whole[1:]
    assert all(len(item.tokens) <= most and item.answer == len(item.tokens) - 1 for item in found)
    assert all(before.tokens[-1] == after.tokens[0] for before, after in pairwise(found))


# What is drawn ---------------------------------------------------------------------------------------------------

MANY = [(f"question {n}?", f"answer {n}") for n in range(50)]


def names(items: Sequence[Encoded]) -> set[str]:
    return {item.name for item in items}


def test_items_are_drawn_under_the_seed_and_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "items.json", MANY)
    settings = DataSettings(train=(file,), limit=20, held_out_limit=10, template="plain")
    one, two, other = (read_corpus(settings, TOKENIZER, seed) for seed in (1, 1, 2))
    assert one == two != other
    assert (len(one.train), len(one.held_out)) == (20, 10)
    assert not names(one.train) & names(one.held_out)
    number = int(one.train[0].name.rpartition(" ")[2])
    assert TOKENIZER.decode(one.train[0].tokens) == f"<s>question {number - 1}?\nanswer {number - 1}</s>"


def test_each_file_has_its_limit_and_held_out_files_their_own(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.json", [(name + q, a) for q, a in MANY]) for name in ("a", "b", "c")]
    settings = DataSettings(train=(*files[:2],), held_out=(files[2],), limit=7, held_out_limit=5, template="plain")
    found = read_corpus(settings, TOKENIZER, 0)
    assert Counter(item.name[0] for item in found.train) == {"a": 7, "b": 7}
    assert Counter(item.name[0] for item in found.held_out) == {"c": 5}


def test_a_question_that_is_held_out_is_trained_on_from_no_other_file(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.json", MANY), write(tmp_path / "b.json", MANY[:10])
    settings = DataSettings(train=(train,), held_out=(held_out,), template="plain")
    assert len(read_corpus(settings, TOKENIZER, 0).train) == 40


# In which order --------------------------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)
ways = st.sampled_from(["shuffled", "by_length", "packed"])


def items_of(sizes: Sequence[int]) -> list[Encoded]:
    return [Encoded((at,) * size, 1, str(at)) for at, size in enumerate(sizes)]


@given(sizes=lengths, batching=ways, seed=st.integers(0, 1000))
def test_an_epoch_has_every_item_once_and_no_row_is_too_long(sizes: list[int], batching: Batching, seed: int) -> None:
    order = rows(items_of(sizes), batching=batching, max_length=20, batch=4, seed=seed, epochs=1)
    assert sorted(item for row in order for item in row) == list(range(len(sizes)))
    assert max(sum(sizes[item] for item in row) for row in order) <= 20
    assert tokens_of(items_of(sizes), order) == sum(sizes)


@given(sizes=lengths, batching=ways, count=st.integers(1, 100))
def test_so_many_rows_are_the_first_of_so_many_epochs(sizes: list[int], batching: Batching, count: int) -> None:
    items = items_of(sizes)
    first = rows(items, batching=batching, max_length=20, batch=4, seed=0, count=count)
    every = rows(items, batching=batching, max_length=20, batch=4, seed=0, epochs=100)
    assert len(first) == count
    assert first == every[:count]


def test_epochs_differ_and_a_part_of_one_is_its_beginning() -> None:
    items = items_of([3] * 40)
    every = rows(items, batching="shuffled", max_length=20, batch=4, seed=0, epochs=2)
    assert every[:40] != every[40:]
    assert rows(items, batching="shuffled", max_length=20, batch=4, seed=0, epochs=1.5) == every[:60]


def test_rows_of_like_length_come_together() -> None:
    sizes = [1 + (7 * n) % 20 for n in range(400)]

    def padding(batching: Batching) -> int:
        order = [row[0] for row in rows(items_of(sizes), batching=batching, max_length=20, batch=4, seed=0, epochs=1)]
        batches = [[sizes[item] for item in order[at : at + 4]] for at in range(0, len(order), 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert padding("by_length") < padding("shuffled") / 5


def test_packing_fills_rows() -> None:
    sizes = [1 + (7 * n) % 20 for n in range(400)]
    order = rows(items_of(sizes), batching="packed", max_length=64, batch=4, seed=0, epochs=1)
    assert sum(sizes) / (64 * len(order)) > 0.95


# What the model sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_answers_alone_give_the_loss_of_all(packed: bool) -> None:
    torch.manual_seed(0)
    model = llama(vocab_size=258, max_position_embeddings=64, use_cache=False).eval()
    items = [Encoded(tuple(range(start, start + size)), 2, "") for start, size in ((5, 9), (40, 4), (90, 7), (7, 12))]
    batches = [[items[0], items[1]], [items[2], items[3]]] if packed else [[item] for item in items]
    losses = []
    for answers_only in (False, True):
        batch = Collate(257, packed, answers_only=answers_only)(batches)
        del batch["names"]
        with torch.no_grad():
            output = model(**batch)
        losses.append(float(output.loss))
        assert output.logits.shape[1] < batch["input_ids"].shape[1] or not answers_only
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_item_of_a_packed_row_sees_another(attention: str) -> None:
    """Logits of an item in a packed, padded batch are those it has alone."""
    torch.manual_seed(0)
    model = llama(vocab_size=258, max_position_embeddings=64, attn_implementation=attention, use_cache=False).eval()
    scatter(model)
    items = [Encoded(tuple(range(start, start + size)), 2, "") for start, size in ((5, 9), (40, 4), (90, 7), (7, 12))]
    batch = Collate(257, packed=True)([[items[0], items[1], items[2]], [items[3]]])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        alone = [model(input_ids=torch.tensor([item.tokens])).logits[0] for item in items]
    places = [together[0, :9], together[0, 9:13], together[0, 13:20], together[1, :12]]
    for place, logits in zip(places, alone, strict=True):
        torch.testing.assert_close(place, logits, rtol=1e-5, atol=1e-5)
    assert [int((row != IGNORED).sum()) for row in batch["labels"]] == [6, 2]
