"""The forms of an item: what people have, as questions with answers.

{"messages": [{"role", "content"}, …]}   a conversation; also ShareGPT's {"conversations": [{"from", "value"}, …]}. Each
                                         turn of the assistant is an item, after all that came before it
{"prompt", "completion"}                 text as the model is to see it, or messages; also "response"
{"instruction", "input", "output"}       Alpaca's; also Dolly's "context" and "response". Where the instruction ends in
                                         "Answer format: answer1/answer2/…", as in the commonsense sets of
                                         LLM-Adapters, the output words the "answer" among these choices
{"question", "answer", "choices"}        choices optional; answer is one of them, or its index from 0. Also ARC's, whose
                                         choices are {"label", "text"} and "answerKey" a label
{"text"}                                 text that nobody asks for
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from d2surgery.errors import brief

_ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S[^\n]*)")
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant")},
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip


class Turn(NamedTuple):
    role: str  # system, developer, user or assistant
    text: str


@dataclass(frozen=True)
class Item:
    """What is asked, what should be said, and between what to choose, in the answer's wording: () when free-form."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    before: tuple[Turn, ...] = ()  # of a conversation: what was said before the prompt
    bare: bool = False  # written as the model is to see it: nothing is put around it unless a template is asked for

    @property
    def opening(self) -> str:
        """The first question of its conversation; of a text the text."""
        return next((turn.text for turn in self.before if turn.role == "user"), self.prompt or self.answer)


class Malformed(ValueError):
    """Why an item cannot be used."""


def items_of(value: Any) -> list[Item]:
    """One, but of a conversation one for each answer. Raises Malformed."""
    if not isinstance(value, dict):
        raise Malformed(f"not an object but {type(value).__name__}")
    there = [name for name in _FORMS if name in value]
    filled = [name for name in there if value[name] is not None]  # a table has every column in every row
    for name in filled or there:
        return _FORMS[name](value)
    known = ", ".join(map(brief, list(value)[:6])) or "no field"
    raise Malformed(f"none of {', '.join(_FORMS)}, but {known}")


# Conversations --------------------------------------------------------------------------------------------------------


def _conversation(value: Mapping[str, Any]) -> list[Item]:
    return _answers(_turns(value, "messages" if "messages" in value else "conversations"))


def _answers(turns: Sequence[Turn], first: int = 0) -> list[Item]:
    """The assistant's turns from the `first`, each an item."""
    found = []
    for at, turn in enumerate(turns):
        if turn.role != "assistant" or at < first:
            continue
        if not at or turns[at - 1].role != "user":
            raise Malformed(f"turn {at + 1} is of the assistant and answers no turn of the user")
        found.append(Item(turns[at - 1].text, turn.text, before=tuple(turns[: at - 1])))
    if not found:
        raise Malformed("no turn of the assistant")
    return found


def _turns(value: Mapping[str, Any], name: str) -> list[Turn]:
    turns = value.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Malformed(f"{name} is not a list of turns")
    return [_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(turns, 1)]


def _turn(turn: Mapping[str, Any], place: str) -> Turn:
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Malformed(f"{place} is of {brief(said)}, none of {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # in parts, as of models that see images
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise Malformed(f"{place} has a part that is no text")
        content = "".join(map(str, texts))
    name = f"the text of {place}"
    return Turn(role, _text({name: content}, name, optional=role in ("system", "developer")))


def _completion(value: Mapping[str, Any]) -> list[Item]:
    name = "response" if "response" in value and "completion" not in value else "completion"
    if isinstance(value["prompt"], list) or isinstance(value.get(name), list):
        asked = _turns(value, "prompt")
        return _answers([*asked, *_turns(value, name)], len(asked))
    return [Item(_text(value, "prompt"), _text(value, name), bare=True)]


def _alone(value: Mapping[str, Any]) -> list[Item]:
    if "label" in value:
        raise Malformed("a text with a label: wanted question, choices and answer")
    return [Item("", _text(value, "text"), bare=True)]


# Questions ------------------------------------------------------------------------------------------------------------


def _instruction(value: Mapping[str, Any]) -> list[Item]:
    instruction = _text(value, "instruction")
    output = _text(value, "output" if "output" in value or "response" not in value else "response")
    more = _text(value, "input" if "input" in value else "context", optional=True)
    prompt = f"{instruction}\n{more}" if more else instruction
    options = _options(instruction)
    label = _text(value, "answer", optional=True) or next((o for o in options if output.endswith(o)), "")
    if not options:
        return [Item(prompt, output)]
    if label not in options:
        raise Malformed(f"the answer {brief(label)!r} is not in its answer format {brief('/'.join(options))}")
    before, found, after = output.rpartition(label)
    if not found:
        raise Malformed(f"the output {brief(output)!r} does not contain the answer {brief(label)!r}")
    return [Item(prompt, output, tuple(f"{before}{option}{after}" for option in options))]


def _options(instruction: str) -> tuple[str, ...]:
    """What stands after the last "Answer format:", () where nothing does."""
    found = _ANSWER_FORMAT.findall(instruction)
    options = tuple(part.strip() for part in found[-1].split("/")) if found else ()
    if len(set(options)) < len(options) or "" in options or len(options) == 1:
        raise Malformed(f"no choice between different answers in the answer format {brief('/'.join(options))!r}")
    return options


def _question(value: Mapping[str, Any]) -> list[Item]:
    question = _text(value, "question")
    choices, answer = value.get("choices"), value.get("answer")
    choices = [] if choices is None else choices
    if isinstance(choices, dict):
        choices, answer = _lettered(choices, value.get("answerKey"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise Malformed("choices is not a list of texts")
    for choice in choices:
        _text({"choices": choice}, "choices")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise Malformed("no choice between different answers")
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise Malformed(f"the answer {brief(answer)} is not an index of its {len(choices)} choices, counted from 0")
        answer = choices[answer]
    answer = _text({"answer": answer}, "answer")
    if choices and answer not in choices:
        raise Malformed(f"the answer {brief(answer)!r} is not one of its choices")
    return [Item(question, answer, tuple(choices))]


def _lettered(choices: Mapping[str, Any], key: Any) -> tuple[Any, Any]:
    """The texts, and that of the label."""
    labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise Malformed("choices has no label for each text")
    if key not in labels:
        raise Malformed(f"the answerKey {brief(key)!r} is none of the labels {brief(labels)}")
    return texts, texts[labels.index(key)]


def _text(value: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    text = value.get(name)
    if optional and text is None:
        return ""
    if not isinstance(text, str):
        raise Malformed(f"{name} is {'missing' if text is None else f'not a text but {type(text).__name__}'}")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Malformed(f"{name} holds half a character (a lone surrogate)")
    if not optional and not text.strip():
        raise Malformed(f"{name} is empty")
    return text


_FORMS: dict[str, Callable[[Mapping[str, Any]], list[Item]]] = {  # by a field that only it has, the most telling first
    "messages": _conversation,
    "conversations": _conversation,
    "instruction": _instruction,
    "question": _question,
    "prompt": _completion,
    "text": _alone,
}
