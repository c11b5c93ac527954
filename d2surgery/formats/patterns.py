"""Regular expressions of strangers, matched in a time that their length and the name's bound.

Python's `re` tries one way after another, and `(a+)+$` has as many ways as a name has subsets. Here all go on at once:
a set of places in the name is an integer with a bit for each, and a step of the expression takes such a set to those
where it may end. What can be reached so is what `re` finds; only the order in which it looks is lost.

`re`'s own parser reads the expression, so that it means the same. Refused is what has no such bound, and what
nobody needs to name modules: what refers back to a group, what forbids going back (atomic groups, possessive repeats).
"""

import re
from collections.abc import Callable, Iterator
from re import _parser as parser  # type: ignore[attr-defined]  # it has no public name; tests compare with `re`
from typing import Any

from d2surgery.errors import refuse

STEPS = 2_000_000  # of all matches together; a million take about half a second

Places = int  # bit i: before the i-th character
Step = Callable[["_Name", Places], Places]


class BadExpression(ValueError):
    """Why an expression cannot be used."""


class Matcher:
    """Matches expressions with names; one for all of a config's, which share its time.

    Raises BadExpression for what is no regular expression, or none of those that are matched here; D2SurgeryError
    BAD_CONFIG when together they take too long.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self._expressions: dict[str, Step | BadExpression] = {}
        self._names: dict[str, _Name] = {}

    def compile(self, expression: str) -> Step:
        if expression not in self._expressions:
            self.spend(500 + 20 * len(expression))  # to read one takes as long as many matches
            try:
                self._expressions[expression] = _compiled(expression)
            except BadExpression as error:
                self._expressions[expression] = error
        found = self._expressions[expression]
        if isinstance(found, BadExpression):
            raise found
        return found

    def fits(self, expression: str, name: str) -> bool:
        """re.fullmatch; of an expression that ends in `$` also re.match."""
        return bool(self.ends(expression, name, 0) >> len(name))

    def ends(self, expression: str, name: str, start: int) -> Places:
        """Where a match that begins at `start` may end."""
        if name not in self._names:
            self.spend(len(name))
            self._names[name] = _Name(name, self)
        return self.compile(expression)(self._names[name], 1 << start)

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise refuse("BAD_CONFIG", "its expressions take too long to match", wanted="plain names of modules")


class _Name:
    """A text and where each of its characters stands."""

    def __init__(self, text: str, matcher: Matcher) -> None:
        self.text, self.spend = text, matcher.spend
        self.whole: Places = (1 << len(text)) - 1
        self.sets: dict[object, Places] = {}  # of what was asked for already
        self.at: dict[str, Places] = {}
        for place, character in enumerate(text):
            self.at[character] = self.at.get(character, 0) | 1 << place


def _compiled(expression: str) -> Step:
    try:
        tree = parser.parse(expression)
        return _sequence(tree, tree.state.flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadExpression(str(error)) from None


def _sequence(tree: Any, flags: int) -> Step:
    steps = [_step(kind, value, flags) for kind, value in tree]

    def go(name: _Name, places: Places) -> Places:
        name.spend(len(steps) + 1)
        for step in steps:
            if not places:
                return 0
            places = step(name, places)
        return places

    return go


def _step(kind: Any, value: Any, flags: int) -> Step:
    if kind in _CHARACTERS:
        return _character(kind, value, flags)
    make = _STEPS.get(str(kind))
    if make is None:
        raise BadExpression(f"{str(kind).lower()} is not matched here")
    return make(value, flags)


# One character --------------------------------------------------------------------------------------------------------

_CHARACTERS = (parser.LITERAL, parser.NOT_LITERAL, parser.ANY, parser.IN)
_CLASSES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip


def _character(kind: Any, value: Any, flags: int) -> Step:
    those = _those(kind, value, flags)
    return lambda name, places: (places & those(name)) << 1


def _those(kind: Any, value: Any, flags: int) -> Callable[["_Name"], Places]:
    """Where in a name the characters stand that an expression of one character fits."""
    if kind is parser.LITERAL and not flags & re.IGNORECASE:
        letter = chr(value)
        return lambda name: name.at.get(letter, 0)
    fits = re.compile(_written(kind, value), flags & (re.IGNORECASE | re.ASCII | re.DOTALL)).fullmatch

    def find(name: _Name) -> Places:
        if find not in name.sets:
            name.sets[find] = sum(at for letter, at in name.at.items() if fits(letter))
        return name.sets[find]

    return find


def _written(kind: Any, value: Any) -> str:
    """The expression of one character, as text again."""
    if kind is parser.ANY:
        return "."
    if kind is not parser.IN:
        return f"[{'^' * (kind is parser.NOT_LITERAL)}{_escaped(value)}]"
    parts = []
    for part, what in value:
        if part is parser.NEGATE:
            parts.append("^")
        elif part is parser.LITERAL:
            parts.append(_escaped(what))
        elif part is parser.RANGE:
            parts.append(f"{_escaped(what[0])}-{_escaped(what[1])}")
        else:
            parts.append(_CLASSES[str(what)])
    return f"[{''.join(parts)}]"


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"


# Places ---------------------------------------------------------------------------------------------------------------


def _position(kind: Any, flags: int) -> Step:
    lines = bool(flags & re.MULTILINE)
    if str(kind) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
        word = re.compile(r"\w", flags & re.ASCII).fullmatch
        inside = str(kind) == "AT_NON_BOUNDARY"

        def edges(name: _Name, places: Places) -> Places:
            words = sum(at for letter, at in name.at.items() if word(letter))
            between = words ^ words << 1
            return places & (~between if inside else between)

        return edges

    def go(name: _Name, places: Places) -> Places:
        breaks, end = name.at.get("\n", 0), 1 << len(name.text)
        if str(kind) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return places & (1 | (breaks << 1 if lines and str(kind) == "AT_BEGINNING" else 0))
        if str(kind) == "AT_END":
            return places & (end | (breaks if lines else breaks & end >> 1))
        return places & end

    return go


def _branch(value: Any, flags: int) -> Step:
    ways = [_sequence(tree, flags) for tree in value[1]]

    def go(name: _Name, places: Places) -> Places:
        found = 0
        for way in ways:
            found |= way(name, places)
        return found

    return go


def _group(value: Any, flags: int) -> Step:
    _, more, less, tree = value
    return _sequence(tree, (flags | more) & ~less)


def _repeat(value: Any, flags: int) -> Step:
    least, most, tree = value
    if len(tree) == 1 and tree[0][0] in _CHARACTERS and most is parser.MAXREPEAT:
        kind, what = tree[0]
        return _run(least, _those(kind, what, flags))
    body = _sequence(tree, flags)

    def go(name: _Name, places: Places) -> Places:
        for _ in range(least):
            before, places = places, body(name, places)
            if places in (0, before):
                break  # once more changes nothing
        reached = new = places
        for _ in range(min(most, len(name.text) + least + 1) - least):
            if not new:
                break
            new = body(name, new) & ~reached
            reached |= new
        return reached

    return go


def _run(least: int, those: Callable[[_Name], Places]) -> Step:
    """`.*`, `\\w+`: through a run of ones a sum carries as far as the run goes (Hyyrö, 2005)."""

    def go(name: _Name, places: Places) -> Places:
        found = those(name)
        for _ in range(min(least, len(name.text) + 1)):
            places = (places & found) << 1
        return places | (places & found) + found ^ found

    return go


def _look(value: Any, flags: int, *, wanted: bool) -> Step:
    direction, tree = value
    body = _sequence(tree, flags)
    least, most = tree.getwidth()
    back = least if direction < 0 else 0
    if direction < 0 and least != most:
        raise BadExpression("look-behind requires fixed-width pattern")

    def go(name: _Name, places: Places) -> Places:
        found = 0
        for at in _single(places):
            ends = body(name, at >> back)
            found |= at * (bool(ends & at if direction < 0 else ends) == wanted)
        return found

    return go


def _single(places: Places) -> Iterator[Places]:
    while places:
        lowest = places & -places
        yield lowest
        places ^= lowest


_STEPS: dict[str, Callable[[Any, int], Step]] = {
    "AT": _position,
    "BRANCH": _branch,
    "SUBPATTERN": _group,
    "MAX_REPEAT": _repeat,
    "MIN_REPEAT": _repeat,
    "ASSERT": lambda value, flags: _look(value, flags, wanted=True),
    "ASSERT_NOT": lambda value, flags: _look(value, flags, wanted=False),
}
