"""Items and prompts from files: what is read, and what every malformed one is told."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.forms import Item, Turn
from d2surgery.evaluating.items import encode, read_entries, read_items, read_prompts, render

COMMONSENSE = {
    "instruction": "Choose.\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
QUESTION = {"question": "Capital of France?", "answer": "Paris", "choices": ["Rome", "Paris"]}
BOTH = [
    Item(
        COMMONSENSE["instruction"],
        "the correct answer is answer2",
        ("the correct answer is answer1", "the correct answer is answer2"),
    ),
    Item("Capital of France?", "Paris", ("Rome", "Paris")),
]


def write(path: Path, values: list[Any], *, lines: bool = False, packed: bool = False) -> Path:
    text = "\n".join(map(json.dumps, values)) + "\n" if lines else json.dumps(values, indent=2)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def faults(path: Path) -> list[str]:
    with pytest.raises(D2SurgeryError) as error:
        read_items(path)
    return [
        f"{problem.code} {problem.file.removeprefix(str(path))}: {problem.message}" for problem in error.value.problems
    ]


def codes(reader: Callable[[Path], Any], path: Path) -> set[str]:
    """What stood in the way of reading; nothing when all went well."""
    try:
        reader(path)
    except D2SurgeryError as error:
        return {problem.code for problem in error.problems}
    return set()


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_and_lines_plain_and_packed_read_the_same(tmp_path: Path, lines: bool, packed: bool) -> None:
    assert read_items(write(tmp_path / "items", [COMMONSENSE, QUESTION], lines=lines, packed=packed)) == BOTH


def test_a_byte_order_mark_blank_lines_and_carriage_returns_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(f"\ufeff{json.dumps(COMMONSENSE)}\r\n\r\n{json.dumps(QUESTION)}\r\n".encode())
    assert read_items(path) == BOTH


text = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(text, st.lists(text, min_size=2, unique=True), st.integers(0)), min_size=1))
def test_whatever_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    items = [Item(question, choices[at % len(choices)], tuple(choices)) for question, choices, at in rows]
    values = [{"question": i.prompt, "answer": i.answer, "choices": list(i.choices)} for i in items]
    path = tmp_path_factory.mktemp("items") / "items"
    assert read_items(write(path, values)) == items
    path.write_text("\n".join(json.dumps(value, ensure_ascii=False) for value in values), newline="")
    assert read_items(path) == items  # U+2028 and the like stand inside a line of JSON


@given(st.binary(max_size=200))
def test_any_bytes_are_items_or_a_named_problem(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("items") / "items"
    for content in (data, b"\x1f\x8b" + data, gzip.compress(data), b"[" + data, b"{" + data):
        path.write_bytes(content)
        for reader in (read_items, read_prompts):
            assert codes(reader, path) <= {"BAD_DATA", "LFS_POINTER"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["instruction", "input", "output", "answer", "question", "choices"])


@given(st.lists(st.dictionaries(fields, json_values), min_size=1, max_size=4))
def test_any_json_is_items_or_a_named_problem(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    path = write(tmp_path_factory.mktemp("items") / "items", values)
    found = codes(read_items, path)
    assert found <= {"BAD_DATA"}
    items = [] if found else read_items(path)
    assert len(items) == (0 if found else len(values))
    assert all(item.answer in item.choices or not item.choices for item in items)


def test_an_answer_may_be_an_index(tmp_path: Path) -> None:
    assert read_items(write(tmp_path / "items", [QUESTION | {"answer": 1}])) == BOTH[1:]


def test_without_an_answer_format_the_answer_is_free(tmp_path: Path) -> None:
    free = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert read_items(write(tmp_path / "items", [free])) == [Item("Translate.\nchat", "cat")]


def test_options_are_worded_as_the_output_is(tmp_path: Path) -> None:
    value = {"instruction": "Is it?\nAnswer format: true/false", "output": "I say true, true!", "answer": "true"}
    (item,) = read_items(write(tmp_path / "items", [value]))
    assert item.choices == ("I say true, true!", "I say true, false!")
    (item,) = read_items(write(tmp_path / "items", [{k: v for k, v in COMMONSENSE.items() if k != "answer"}]))
    assert item == BOTH[0]


USER, BOT = {"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "four"}
LETTERED = {"label": ["A", "B"], "text": ["Rome", "Paris"]}
FORMS: list[tuple[dict[str, Any], list[Item]]] = [
    ({"messages": [USER, BOT]}, [Item("2 and 2?", "four")]),
    ({"messages": [USER, BOT, USER], "prompt": "an id"}, [Item("2 and 2?", "four")]),
    (
        {"conversations": [{"from": "human", "value": "2 and 2?"}, {"from": "gpt", "value": "four"}, USER, BOT]},
        [
            Item("2 and 2?", "four"),
            Item("2 and 2?", "four", before=(Turn("user", "2 and 2?"), Turn("assistant", "four"))),
        ],
    ),
    (
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                BOT,
            ]
        },
        [Item("a", "four", before=(Turn("system", ""),))],
    ),
    ({"prompt": "def f", "completion": "(): ..."}, [Item("def f", "(): ...", bare=True)]),
    ({"prompt": "def f", "response": "(): ..."}, [Item("def f", "(): ...", bare=True)]),
    (
        {"prompt": [USER, BOT, USER], "completion": [BOT]},
        [Item("2 and 2?", "four", before=(Turn("user", "2 and 2?"), Turn("assistant", "four")))],
    ),
    (
        {"instruction": "Who?", "context": "A cat.", "response": "A cat", "category": "qa"},
        [Item("Who?\nA cat.", "A cat")],
    ),
    ({"instruction": "Who?", "input": "", "output": "A cat", "text": "all of it"}, [Item("Who?", "A cat")]),
    ({"messages": None, "question": "2 and 2?", "answer": "four", "choices": None}, [Item("2 and 2?", "four")]),
    ({"question": "Capital of France?", "choices": LETTERED, "answerKey": "B"}, BOTH[1:]),
    ({"text": "Once upon a time", "id": 3}, [Item("", "Once upon a time", bare=True)]),
]


@pytest.mark.parametrize(("value", "wanted"), FORMS)
def test_data_are_read_as_people_have_them(tmp_path: Path, value: dict[str, Any], wanted: list[Item]) -> None:
    assert read_items(write(tmp_path / "items", [value])) == wanted
    assert read_entries(write(tmp_path / "items", [value, QUESTION], lines=True)) == [wanted, BOTH[1:]]


MALFORMED = [  # (a value, part of the message)
    ([], "not an object but list"),
    ({}, "but no field"),
    ({"label": "x"}, "none of messages, conversations, instruction, question, prompt, text, but label"),
    ({"text": "x", "label": 1}, "a text with a label: wanted question, choices and answer"),
    ({"text": " "}, "text is empty"),
    ({"prompt": "x", "chosen": "y"}, "completion is missing"),
    ({"prompt": [USER], "completion": "x"}, "completion is not a list of turns"),
    (QUESTION | {"choices": LETTERED, "answerKey": "C"}, "the answerKey 'C' is none of the labels ['A', 'B']"),
    (QUESTION | {"choices": LETTERED | {"label": ["A"]}}, "choices has no label for each text"),
    ({"question": None}, "question is missing"),
    ({"messages": "x"}, "messages is not a list of turns"),
    ({"messages": []}, "no turn of the assistant"),
    ({"messages": [USER]}, "no turn of the assistant"),
    ({"messages": [BOT]}, "turn 1 is of the assistant and answers no turn of the user"),
    ({"messages": [USER, BOT, BOT]}, "turn 3 is of the assistant and answers no turn of the user"),
    ({"messages": [USER, {"role": "tool", "content": "4"}, BOT]}, "turn 2 of messages is of tool, none of system, "),
    ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "the text of turn 2 of messages is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]},
        "turn 1 of messages has a part that is no ",
    ),
    (COMMONSENSE | {"output": None}, "output is missing"),
    (COMMONSENSE | {"output": 3}, "output is not a text but int"),
    (COMMONSENSE | {"instruction": " "}, "instruction is empty"),
    (COMMONSENSE | {"input": ["x"]}, "input is not a text but list"),
    (COMMONSENSE | {"answer": "answer9"}, "the answer 'answer9' is not in its answer format answer1/answer2"),
    (COMMONSENSE | {"output": "yes"}, "the output 'yes' does not contain the answer 'answer2'"),
    (COMMONSENSE | {"instruction": "Answer format: a/a"}, "no choice between different answers"),
    (QUESTION | {"choices": "Paris"}, "choices is not a list of texts"),
    (QUESTION | {"choices": ["Paris"]}, "no choice between different answers"),
    (QUESTION | {"choices": ["Paris", "Paris"]}, "no choice between different answers"),
    (QUESTION | {"answer": "Oslo"}, "the answer 'Oslo' is not one of its choices"),
    (QUESTION | {"answer": 2}, "the answer 2 is not an index of its 2 choices"),
    (QUESTION | {"answer": True}, "answer is not a text but bool"),
]


@pytest.mark.parametrize(("value", "message"), MALFORMED)
def test_a_malformed_item_says_why_and_where(tmp_path: Path, value: Any, message: str) -> None:
    (fault,) = faults(write(tmp_path / "items.json", [COMMONSENSE, value, QUESTION]))
    assert fault.startswith("BAD_DATA , item 2: ")
    assert message in fault


def test_all_malformed_items_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f'{json.dumps(QUESTION)}\n\n{{"question": 1}}\n3\n')
    assert faults(path) == [
        "BAD_DATA , line 3: question is not a text but int",
        "BAD_DATA , line 4: not an object but int",
    ]
    path.write_text('{"question": \n{}\nnonsense\n')
    assert [fault.partition(": ")[0] for fault in faults(path)] == ["BAD_DATA , line 1", "BAD_DATA , line 3"]


def test_thousands_of_malformed_items_are_counted(tmp_path: Path) -> None:
    found = faults(write(tmp_path / "items", [{"label": "x"}] * 1000))
    assert len(found) == 21
    assert found[-1] == "BAD_DATA : and 980 more"


FILES = [  # (content, code, part of the message)
    (b"", "BAD_DATA", "empty"),
    (b" \n", "BAD_DATA", "empty"),
    (b"[]", "BAD_DATA", "an empty list"),
    (b"[{},\n{]", "BAD_DATA", "line 2: not JSON"),
    (b'{"question": "\xff"}', "BAD_DATA", "not UTF-8 text: byte 14"),
    (gzip.compress(b"[{}]" * 99, mtime=0)[:-9], "BAD_DATA", "the gzip file is damaged"),
    (b"[" * 100_000, "BAD_DATA", "items"),
    (b"version https://git-lfs.github.com/spec/v1\n", "LFS_POINTER", "not the data"),
]


@pytest.mark.parametrize(("content", "code", "message"), FILES)
def test_an_unusable_file_says_why(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    path = tmp_path / "items"
    path.write_bytes(content)
    with pytest.raises(D2SurgeryError, match=message) as error:
        read_items(path)
    assert [problem.code for problem in error.value.problems] == [code]


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match="FILE_MISSING"):
        read_items(tmp_path / "absent")
    with pytest.raises(D2SurgeryError, match="FILE_UNREADABLE"):
        read_items(tmp_path)


# Tables and datasets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_is_read_through_datasets(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed: the extra `data`")
    import pyarrow.csv
    import pyarrow.parquet

    rows = [{"question": f"{n} and {n}?", "answer": f"it is {2 * n}"} for n in range(3)]
    table, path = pyarrow.Table.from_pylist(rows), str(tmp_path / f"items.{ending}")
    pyarrow.parquet.write_table(table, path) if ending == "parquet" else pyarrow.csv.write_csv(table, path)
    assert read_items(tmp_path / f"items.{ending}") == [Item(row["question"], row["answer"]) for row in rows]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA .*bad.parquet: not such a table"):
        read_items(tmp_path / "bad.parquet")
    with pytest.raises(D2SurgeryError, match="FILE_MISSING"):
        read_items(tmp_path / "none.parquet")


class Datasets(SimpleNamespace):
    """The library, offline: what it is asked for, and what it gives or raises."""

    def __init__(self, given: list[Any] | Exception) -> None:
        faults = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
        super().__init__(disable_progress_bars=lambda: None, exceptions=faults)
        self.given = given
        self.asked: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def load_dataset(self, *names: str, **choices: Any) -> list[Any]:
        self.asked.append((names, choices))
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("source", "names", "choices"),
    [
        ("org/data", ("org/data",), {"split": "train", "revision": None}),
        ("org/data:test", ("org/data",), {"split": "test", "revision": None}),
        ("org/data@v1.0:ARC-Easy:train[:10%]", ("org/data", "ARC-Easy"), {"split": "train[:10%]", "revision": "v1.0"}),
        ("hf://datasets/org/data", ("org/data",), {"split": "train", "revision": None}),
    ],
)
def test_a_dataset_of_the_hub_is_named_as_there(
    monkeypatch: pytest.MonkeyPatch, source: str, names: tuple[str, ...], choices: dict[str, Any]
) -> None:
    library = Datasets([QUESTION, QUESTION | {"answer": "Oslo"}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA .*, row 2: the answer 'Oslo' is not one of its choices"):
        read_items(source)
    assert library.asked == [(names, choices)]
    library.given = [QUESTION]
    assert read_items(source) == BOTH[1:]


def test_a_dataset_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Datasets(FileNotFoundError("Dataset 'org/data' doesn't exist")))
    with pytest.raises(D2SurgeryError, match=r"HUB_UNREACHABLE org/data: .*Dataset 'org/data' doesn't exist"):
        read_items("org/data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(D2SurgeryError, match="NO_DATASETS org/data"):
        read_items("org/data")
    for path in ("data/items.json", "data/items.jsonl.gz", "data/a/items"):  # no id of the hub
        with pytest.raises(D2SurgeryError, match="FILE_MISSING"):
            read_items(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert read_items(write(Path("org/data"), [QUESTION])) == BOTH[1:]  # what lies here is not looked for there


PROMPTS = [  # (content, prompts)
    ("The sun\n\n  is hot\n", ["The sun", "  is hot"]),
    ('["one", "two\\nlines"]', ["one", "two\nlines"]),
    ('"one"\n"two"\n', ["one", "two"]),
    (json.dumps([COMMONSENSE, QUESTION, "three"]), [BOTH[0].prompt, BOTH[1].prompt, "three"]),
]


@pytest.mark.parametrize(("content", "prompts"), PROMPTS)
def test_prompts_are_lines_or_json(tmp_path: Path, content: str, prompts: list[str]) -> None:
    path = tmp_path / "prompts"
    path.write_text(content)
    assert read_prompts(path) == prompts


def test_malformed_prompts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('["one", 2]')
    with pytest.raises(D2SurgeryError, match="item 2: not an object but int"):
        read_prompts(path)


# Rendering -------------------------------------------------------------------------------------------------------


class Tokenizer(SimpleNamespace):
    """One token per character after a 1 for <s>."""

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<s>{turn['role']}:{turn['content']}" for turn in turns) + "<bot>"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + list(map(ord, text))}


PLAIN, CHAT = Tokenizer(chat_template=None), Tokenizer(chat_template="x")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{hi}\n\n### Response:\n"
)


def test_templates() -> None:
    assert render("{hi}", PLAIN, "alpaca") == render("{hi}", PLAIN, "auto") == render("{hi}", CHAT, "alpaca") == ALPACA
    assert render("{hi}", CHAT, "auto") == render("{hi}", CHAT, "chat") == "<s>user:{hi}<bot>"
    assert render("{hi}", CHAT, "plain") == "{hi}\n"


def test_a_chat_template_that_is_not_there_is_refused() -> None:
    with pytest.raises(D2SurgeryError, match="no chat template"):
        render("hi", PLAIN, "chat")


def test_special_tokens_come_once() -> None:
    assert encode("hi", CHAT) == encode("hi", CHAT, "chat") == list(map(ord, "<s>user:hi<bot>"))
    assert encode("hi", CHAT, "plain") == [1, *map(ord, "hi\n")]
    assert encode("hi", PLAIN)[0] == 1


# Real data -------------------------------------------------------------------------------------------------------


def test_the_real_commonsense_sets_read_whole() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense"
    if not folder.is_dir():
        pytest.skip("the commonsense sets are not on this machine")
    for path in sorted(folder.glob("*.json.gz")):
        raw = json.loads(gzip.decompress(path.read_bytes()))
        items = read_items(path)
        assert [item.answer for item in items] == [value["output"] for value in raw]
        assert all(len(item.choices) >= 2 and item.answer in item.choices for item in items)
