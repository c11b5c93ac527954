"""Renaming: what a checkpoint's tensors are called in the model, as transformers itself renames them on loading.

The rules are transformers' own (`conversion_mapping.py`), as data in `renamings.json`; `tests/renamed.py` writes that
file and a test compares it with the installed version. A rule is a regular expression and what replaces its match;
rules apply in order. A rule with operations also joins tensors into one, or cuts one into several.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Operations = tuple[tuple[Any, ...], ...]
MERGE, JOIN_EXPERTS, JOIN, CUT = ("MergeModulelist", 0), ("Concatenate", 1), ("Concatenate", 0), ("Chunk", 0)
TURN, TURN_EXPERTS, FIT_EXPERTS = ("Transpose", 0, 1, False), ("Transpose", 1, 2, False), ("Transpose", 1, 2, True)


class Part(NamedTuple):
    """A tensor on disk as part of a parameter of the model."""

    tensor: str
    operations: Operations = ()
    source: int = 0  # which of the parts that are joined
    chunk: tuple[int, int] = (0, 1)  # which of how many equal parts that it is cut into


@dataclass(frozen=True)
class Rule:
    """One of transformers' renamings or converters."""

    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    operations: Operations
    guarded: bool  # several renamings at once, only where the first applies to some tensor
    scope: str | None  # the submodule whose names these are
    base: str

    def apply(self, name: str, *, guard: bool = True) -> tuple[tuple[str, ...], int | None]:
        """The new name (per target) and which source matched; the name itself and None where none does."""
        prefix = self._prefix(name)
        rest = name.removeprefix(prefix or "")
        match = None if prefix is None else self.pattern.search(rest)
        if prefix is None or match is None:
            return (name,), None
        found = match
        group = next(key for key, value in found.groupdict().items() if value is not None)
        source, first = int(group[1:]), self.pattern.groupindex[group]
        if self.guarded and source and not guard:
            return (name,), None
        targets = (self.targets[source],) if self.guarded else self.targets
        filled = [re.sub(r"\\(\d)", lambda digit: found[first + int(digit[1])], target) for target in targets]
        return tuple(prefix + rest.replace(found[0], target, 1) for target in filled), source

    def _prefix(self, name: str) -> str | None:
        """What of the name stands before the scope's own names; None outside the scope."""
        scope = f"{self.scope}." if self.scope else ""
        base = f"{self.base}." if self.base and self.scope is not None else ""
        return next((prefix for prefix in (base + scope, scope) if name.startswith(prefix)), None)


class Renaming:
    """What transformers applies to a checkpoint of one architecture."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        rules = rules_of(*_architecture(config))
        self.renamings = [rule for rule in rules if not rule.operations]
        self.converters = [rule for rule in rules if rule.operations]

    def name(self, name: str, guards: frozenset[int] = frozenset()) -> str:
        """The name in the model, before anything is joined or cut."""
        for number, rule in enumerate(self.renamings):
            (name,), _ = rule.apply(name, guard=number in guards)
        return name

    def targets(self, name: str) -> tuple[str, ...]:
        """The parameters that a tensor of this renamed name becomes, or becomes part of."""
        applied = (rule.apply(name) for rule in self.converters)
        return next((names for names, source in applied if source is not None), (name,))

    def guards(self, tensors: Iterable[str]) -> frozenset[int]:
        """The rules of several renamings at once that apply to a checkpoint of these tensors."""
        return frozenset(
            number for number, rule in enumerate(self.renamings)
            if rule.guarded and any(rule.apply(tensor)[1] == 0 for tensor in tensors)
        )  # fmt: skip

    def parts(self, tensors: Iterable[str]) -> dict[str, list[Part]]:
        """A parameter's name in the model -> the tensors on disk that hold it."""
        tensors, found = list(tensors), dict[str, list[Part]]()
        guards = self.guards(tensors)
        for tensor in tensors:
            name = self.name(tensor, guards)
            for rule in self.converters:
                names, source = rule.apply(name)
                if source is not None:
                    for number, target in enumerate(names):
                        part = Part(tensor, rule.operations, source, (number, len(names)))
                        found.setdefault(target, []).append(part)
                    break
            else:
                found.setdefault(name, []).append(Part(tensor))
        return found


def _architecture(config: Mapping[str, Any]) -> tuple[str, str]:
    named, model_type = config.get("architectures"), config.get("model_type")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return name, model_type if isinstance(model_type, str) else ""


@cache
def rules_of(architecture: str, model_type: str) -> tuple[Rule, ...]:
    """The rules for a class; for one of its model type where the class is not known."""
    if not architecture and not model_type:
        return ()
    known = table()
    models: Mapping[str, list[list[str | None]]] = known["models"]
    entries = models.get(architecture) or models.get(known["types"].get(model_type, ""), [])
    if architecture in known["plain"]:
        entries = []
    return tuple(
        _rule(found, scope, base)
        for scope, base, key in (*entries, (None, None, "legacy"))
        for found in _mapping(known["mappings"], key)
    )


@cache
def table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((Path(__file__).parent / "renamings.json").read_text())
    return found


def _mapping(mappings: Mapping[str, Any], key: Any) -> list[Any]:
    found = mappings[key]
    return _mapping(mappings, found) if isinstance(found, str) else list(found)


def _rule(found: list[Any], scope: str | None, base: str | None) -> Rule:
    pattern, targets, operations = found
    guarded = operations == "group"
    steps = tuple(tuple(step) for step in operations or ()) if not guarded else ()
    return Rule(re.compile(pattern), tuple(targets), steps, guarded, scope, base or "")
