"""Names: where a tensor known by its name in the model lies in the base's files.

In this order: what transformers makes of the tensors on disk (`renaming`), the name on disk itself, the name as
transformers would rename it (an adapter of an older version), families' older names by their look, the same with one
prefix more or less; and, when all of an adapter's names lack or have the same prefix, without or with that one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from d2surgery.errors import Problems
from d2surgery.files.header import Header
from d2surgery.placement.renaming import CUT, FIT_EXPERTS, JOIN, JOIN_EXPERTS, MERGE, TURN, TURN_EXPERTS, Part, Renaming
from d2surgery.placement.ties import Tie

# What some tensors are called on disk where the config does not say which model it is.
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))  # Mixtral and MiniMax; GPT-NeoX
_EXPERTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # parameter in the model -> per family, the tensors on disk of one expert, whose rows follow each other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_NUMBER = re.compile(r"\d+")
_COMPARED = 2_000_000  # pairs of letters that are compared to find the nearest names, before none is looked for
# A model for pictures or sound inside another: no prefix may lead into one or out of it.
_TOWERS = re.compile(r"(?:^|[._])(vision|visual|image|img|vit|audio|speech|video|vqmodel|vq|acoustic)")
# What a language model may lie under, and what may therefore be missing or in the way.
_ROOTS = frozenset(("model", "language_model", "text_model", "thinker", "talker", "transformer", "llm", "base_model"))


class Place(NamedTuple):
    """A tensor on disk and the rows of the adapter's output that it holds."""

    tensor: str
    out: tuple[int, int | None]
    expert: int
    rows: tuple[int, int] | None = None  # of the tensor; None: all of it
    turned: bool | None = None  # its rows are the adapter's columns; None: its shape tells


class _Move(NamedTuple):
    """A prefix of an adapter's names and the one that stands there in the base."""

    old: str
    new: str


class Names:
    """A base's tensors by the names that the model has for them."""

    def __init__(self, base: Header, config: Mapping[str, Any], tie: Tie, say: Problems) -> None:
        self.base, self.tie, self.say = base, tie, say
        self.renaming = Renaming(config)
        self.parts = self.renaming.parts(base.tensors)
        self.prefixes = sorted({name.partition(".")[0] for name in (*base.tensors, *self.parts)})
        self.moves: list[_Move] = []
        self.ambiguous: dict[str, list[str]] = {}
        self.otherwise: dict[str, str] = {}

    def find(self, name: str) -> list[Place]:
        """The places of a tensor known by its name in the model; [] when there is none."""
        if places := self._spelled(name):
            return places
        candidates = [p for n in self._with_or_without_prefix(name) if (p := self._spelled(n))]
        candidates = list({p[0].tensor: p for p in candidates}.values())
        if len(candidates) > 1:
            self.say("AMBIGUOUS_MODULE", "fits several", module=name, got=", ".join(p[0].tensor for p in candidates))
        if candidates:
            return candidates[0]
        moved = (move.new + name.removeprefix(move.old) for move in self.moves if name.startswith(move.old))
        return next((p for n in moved if (p := self._spelled(n))), [])

    def settle(self, wanted: Mapping[str, int]) -> None:
        """Find the prefix that names without a place lack or have too much: name in the model -> its elements."""
        lost = [name for name in wanted if not self._spelled(name) and not self._near(name)]
        while lost:
            moves = {tuple(self._at(move, lost)): move for move in self._moves(lost[0], wanted) if self._at(move, lost)}
            fitting = {
                tensors: move for tensors, move in moves.items() if all(self._fits(move, n, wanted[n]) for n in lost)
            } or {t: m for t, m in moves.items() if all(self._fits(m, n, wanted[n]) for n in lost if self._moved(m, n))}
            if len(fitting) > 1:
                self.ambiguous[lost[0]] = [tensors[0] for tensors in fitting]
            if len(fitting) != 1:
                lost = lost[1:]
                continue
            (move,) = fitting.values()
            self.moves.append(move)
            done = [name for name in lost if self._moved(move, name)]
            old, new = (f"{prefix}…" if prefix else "no prefix" for prefix in move)
            count = f"{len(done)} {'name' if len(done) == 1 else 'names'}"
            self.say(
                "NAME_MATCHED", f"{count}: {new} in the base", severity="info", module=old, got=self._at(move, done)[0]
            )
            lost = [name for name in lost if name not in done]

    # Prefixes --------------------------------------------------------------------------------------------------------

    def _with_or_without_prefix(self, name: str) -> Iterator[str]:
        shorter = name.partition(".")[2]
        for other in (shorter, *(f"{prefix}.{name}" for prefix in self.prefixes)):
            if _towers(other) == _towers(name):
                yield other

    def _near(self, name: str) -> bool:
        return any(self._spelled(other) for other in self._with_or_without_prefix(name))

    def _moves(self, name: str, wanted: Mapping[str, int]) -> Iterator[_Move]:
        """Every exchange of a prefix that gives the name a place of its size."""
        steps, known = name.split("."), dict.fromkeys((*self.parts, *self.base.tensors))
        for count in range(len(steps) - 1):
            if count and steps[count - 1] not in _ROOTS:
                return
            old, rest = ".".join((*steps[:count], "")) if count else "", ".".join(steps[count:])
            for other in known:
                new = other.removesuffix(rest)
                if new != other and (not new or new.endswith(".")) and new != old and _towers(new) == _towers(old):
                    yield _Move(old, new)

    def _moved(self, move: _Move, name: str) -> list[Place]:
        return self._spelled(move.new + name.removeprefix(move.old)) if name.startswith(move.old) else []

    def _at(self, move: _Move, lost: list[str]) -> list[str]:
        return [places[0].tensor for name in lost if (places := self._moved(move, name))]

    def _fits(self, move: _Move, name: str, elements: int) -> bool:
        places = self._moved(move, name)
        held = sum(prod(self._shape(place.tensor)) for place in places)
        return bool(places) and (elements in (0, held) or any(place.rows for place in places))

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.base.tensors[tensor if tensor in self.base.tensors else self.tie.aliases[tensor]].shape

    # One spelling ----------------------------------------------------------------------------------------------------

    def _spelled(self, name: str) -> list[Place]:
        if places := self._held(name):
            if name in self.base.tensors and name not in {place.tensor for place in places}:
                self.ambiguous[name] = [name, *dict.fromkeys(place.tensor for place in places)]
                return []
            return places
        if name in self.base.tensors or name in self.tie.aliases:
            return [Place(name, (0, None), 0)]
        if places := self._held(self.renaming.name(name)):
            return places
        for spelling in (name, *(name.replace(old, new) for old, new in _RENAMED if old in name)):
            if spelling in self.base.tensors or spelling in self.tie.aliases:
                return [Place(spelling, (0, None), 0)]
            if places := self._experts(spelling):
                return places
        return []

    def _held(self, name: str) -> list[Place]:
        """The places of a parameter of the model, as transformers reads it from disk."""
        parts = self.parts.get(name, [])
        if not parts:
            return []
        first = parts[0]
        if len(parts) > 1 and not first.operations:
            self.ambiguous[name] = [part.tensor for part in parts]
            return []
        turned = True if first.operations in ((TURN,), (TURN_EXPERTS,)) else None
        if first.operations in ((), (TURN,), (TURN_EXPERTS,), (FIT_EXPERTS,)):
            return [Place(first.tensor, (0, None), 0, turned=turned)]
        if first.operations in ((MERGE,), (MERGE, JOIN_EXPERTS), (JOIN,), (JOIN_EXPERTS,)):
            return self._joined(parts, along=first.operations == (JOIN_EXPERTS,))
        number, count = first.chunk
        rows = self.base.tensors[first.tensor].shape[:1]
        if first.operations == (CUT,) and rows and rows[0] % count == 0:
            size = rows[0] // count
            return [Place(first.tensor, (0, None), 0, (number * size, (number + 1) * size))]
        self.otherwise[name] = f"{first.tensor} through {', '.join(str(step[0]) for step in first.operations)}"
        return []

    def _joined(self, parts: list[Part], along: int) -> list[Place]:
        """Tensors that follow each other along an axis of the parameter, expert by expert."""
        by_source: dict[int, list[Part]] = {}
        for part in sorted(parts, key=lambda part: (part.source, _natural(part.tensor))):
            by_source.setdefault(part.source, []).append(part)
        places = []
        for expert, together in enumerate(zip(*by_source.values(), strict=False)):
            start = 0
            for part in together:
                stop = start + self.base.tensors[part.tensor].shape[along]
                places.append(Place(part.tensor, (start, stop), expert))
                start = stop
        return places

    def _experts(self, name: str) -> list[Place]:
        """One place per expert and per tensor, for a parameter that is fused in the model only."""
        root, _, parameter = name.rpartition(".")
        for parts in _EXPERTS.get(parameter, ()) if root.endswith(".experts") else ():
            places: list[Place] = []
            expert = 0
            while all(f"{root}.{expert}.{part}.weight" in self.base.tensors for part in parts):
                start = 0
                for part in parts:
                    tensor = f"{root}.{expert}.{part}.weight"
                    stop = start + self.base.tensors[tensor].shape[0]
                    places.append(Place(tensor, (start, stop), expert))
                    start = stop
                expert += 1
            if places:
                return places
        return []

    def missing(self, module: str) -> None:
        """Say that there is no such module, and what is named nearly so."""
        if several := self.ambiguous.get(module) or self.ambiguous.get(f"{module}.weight"):
            self.say("AMBIGUOUS_MODULE", "fits several", module=module, got=", ".join(several))
            return
        if how := self.otherwise.get(module) or self.otherwise.get(f"{module}.weight"):
            self.say("STORED_OTHERWISE", "on disk in another form", module=module, got=how)
            return
        near = self.nearest(module)
        self.say("NO_SUCH_MODULE", "not in the base", module=module, got=f"nearest: {', '.join(near)}" if near else "")

    @cached_property
    def nearest(self) -> "Nearest":
        return Nearest(name.removesuffix(".weight") for name in self.base.tensors)


class Nearest:
    """The names most like one: of the kinds of name that are most like its own, those with its numbers, else any.

    Names of one kind differ in their numbers alone, so that a model's hundreds of names are about ten to compare.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.kinds: dict[str, dict[tuple[str, ...], str]] = {}
        for name in names:
            self.kinds.setdefault(_NUMBER.sub("0", name), {}).setdefault(tuple(_NUMBER.findall(name)), name)
        self._near: dict[str, list[str]] = {}
        self._left = _COMPARED

    def __call__(self, name: str, count: int = 2) -> list[str]:
        kind, numbers = _NUMBER.sub("0", name), tuple(_NUMBER.findall(name))
        if kind not in self._near:
            self._left -= len(kind) * sum(map(len, self.kinds))
            self._near[kind] = get_close_matches(kind, self.kinds, n=count, cutoff=0.6) if self._left > 0 else []
        found = (self.kinds[near] for near in self._near[kind])
        return [names.get(numbers) or next(iter(names.values())) for names in found]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _towers(name: str) -> frozenset[str]:
    return frozenset(_TOWERS.findall(name))
