"""Which tensor of a merged checkpoint should be which output of the merge: by names and ties, from headers only."""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from d2surgery.auditing.findings import Status, TensorAudit
from d2surgery.auditing.loading import USUAL_PREFIXES, Model, model_of, other_names
from d2surgery.errors import Problem
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import FLOATS, TensorInfo
from d2surgery.files.tensors import DTYPES
from d2surgery.merging.companions import merged_config
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.tiles import Output
from d2surgery.placement.fit import Fit
from d2surgery.placement.ties import find_tie, tie_flag


@dataclass(frozen=True)
class TensorPair:
    """A tensor of the merged file and what it should be; `output` in the dtype of the file."""

    name: str
    output: Output
    info: TensorInfo
    status: Status  # when it is right
    otherwise: str = "TENSOR_CHANGED"  # the code when it is not, of a tied one
    twin: TensorInfo | None = None  # in the file, whose bytes are as right

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor in the merged file."""
        return DTYPES[self.info.dtype]

    @property
    def modules(self) -> tuple[str, ...]:
        return modules_of(self.output)


@dataclass(frozen=True)
class Pairing:
    """Every tensor of both sides: compared (pairs), or listed with what is wrong with it (others)."""

    pairs: tuple[TensorPair, ...]
    others: Mapping[str, TensorAudit]
    shared: frozenset[str]  # tensors in the file that stand for two outputs, by a tie
    tied: bool  # the file leaves an output to its tie, whether the merge ties it or writes it
    problems: tuple[Problem, ...]  # of names
    not_checked: tuple[str, ...]


def pair_up(prepared: Prepared, merged: BaseWeights) -> Pairing:
    """Each expected output with the tensor that holds it; what is missing, extra, resized or of another nature."""
    there = merged.header.tensors
    expected = {output.name: output for output in prepared.outputs}
    ties = find_tie(merged.header, merged.config)
    own_ties = find_tie(prepared.fit.base.header, prepared.fit.base.config).aliases
    matching = _match(expected, there, ties.aliases.keys() | own_ties.keys(), prepared.fit, merged)
    names = matching.names
    pairs: list[TensorPair] = []
    others: dict[str, TensorAudit] = {}
    for name, output in expected.items():
        status, otherwise = right_status(output), "TENSOR_CHANGED"
        found = names.get(name)
        if found is None and ties.aliases.get(name) in there and tie_flag(merged.config) is not False:
            found, status = ties.aliases[name], "tied"
            otherwise = "TIE_DOUBLED" if prepared.fit.landing.untied else "TENSOR_MISSING"
        if found is None:
            code = "" if name in matching.unused else "TENSOR_MISSING"
            others[name] = _lacking(output, name, "missing", code)
        elif wrong := _misfit(output, there[found]):
            others[found] = _lacking(output, found, *wrong, there[found])
        else:
            written = output if there[found].grid else output._replace(dtype=there[found].dtype)
            pairs.append(TensorPair(name if status == "tied" else found, written, there[found], status, otherwise))
    for name in sorted(there.keys() - set(names.values())):
        right = own_ties.get(name, matching.again.get(name, ""))
        info, source, twin = there[name], expected.get(right), there.get(names.get(right, ""))
        if source is not None and source.shape == info.shape and info.dtype in FLOATS:
            pairs.append(
                TensorPair(name, source if info.grid else source._replace(dtype=info.dtype), info, "tied", twin=twin)
            )
        else:
            code = "" if name in matching.unused else "TENSOR_EXTRA"
            others[name] = TensorAudit(
                name=name, status="extra", dtype=info.dtype, shape=info.shape, elements=prod(info.shape), code=code
            )
    left = [name for name in ties.aliases if name not in there]
    return Pairing(
        tuple(pairs), others, frozenset(ties.aliases[name] for name in left), tied=bool(left),
        problems=matching.problems, not_checked=matching.not_checked,
    )  # fmt: skip


def _misfit(output: Output, info: TensorInfo) -> tuple[Status, str] | None:
    """What is wrong with a tensor that cannot be compared: another shape, or another nature than numbers."""
    if info.shape != output.shape:
        return "resized", "TENSOR_RESIZED"
    if output.dtype in FLOATS and info.dtype not in FLOATS:
        return "changed", "REQUANTIZED"
    if output.dtype not in FLOATS and info.dtype != output.dtype:
        return "changed", "TENSOR_CHANGED"
    return None


def modules_of(output: Output) -> tuple[str, ...]:
    """The adapted modules that land in an output."""
    site = output.site
    if site is None:
        return ()
    return (*dict.fromkeys(patch.module for patch in site.patches), *((site.bias,) if site.bias else ()))


def right_status(output: Output) -> Status:
    """What becomes of an output in a right merge."""
    site = output.site
    if site is None or not (site.patches or site.replacement or site.rows or site.bias):
        return "unchanged"
    return "adapted" if site.patches or site.bias else "replaced"


class Matching(NamedTuple):
    """Names of the merged file, by those that they should be."""

    names: Mapping[str, str]  # expected -> in the file
    again: Mapping[str, str] = {}  # in the file, for the second time -> expected
    unused: frozenset[str] = frozenset()  # that transformers neither takes from a file nor misses
    problems: tuple[Problem, ...] = ()
    not_checked: tuple[str, ...] = ()


def _match(
    expected: Mapping[str, Output], there: Mapping[str, TensorInfo], ties: Set[str], fit: Fit, merged: BaseWeights
) -> Matching:
    """Exact names, and where some are not: where transformers would put them, or all of them behind one prefix."""
    names = {name: name for name in expected if name in there}
    if not (expected.keys() ^ there.keys()) - ties:
        return Matching(names)
    left, spare = [*(expected.keys() - names.keys())], there.keys() - names.keys()
    model = model_of(merged, merged_config(fit, None).get("architectures"))
    problems: list[Problem] = []
    unused, again = frozenset[str](), dict[str, str]()
    if isinstance(model, Model):
        taken, again, unused = _by_places(model, expected, there)
        names |= taken
        problems += [other_names(taken, taken=True)] if taken else []
        spare -= {*taken.values(), *again, *unused}
        left = [name for name in left if name not in taken and name not in unused]
    behind = _behind_one_prefix([name for name in left if name not in ties], spare)
    if behind:
        usual = not names and isinstance(model, str) and _prefix(*next(iter(behind.items()))) in USUAL_PREFIXES
        problems.append(other_names(behind, taken=None if usual else False))
    asked = () if isinstance(model, Model) else (f"which names transformers takes: {model}",)
    return Matching(names | behind, again, unused, tuple(problems), asked)


def _by_places(
    model: Model, expected: Mapping[str, Output], there: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], dict[str, str], frozenset[str]]:
    """Expected name -> other name in the file that lands in the same place; name in the file -> expected name that
    has its place already; names of either side that have none and are not missed."""
    wanted, found = model.places(expected), model.places(there)
    owner = {place: name for name, place in wanted.items() if place is not None}
    taken: dict[str, str] = {}
    again: dict[str, str] = {}
    for name in sorted(there.keys() - expected.keys()):
        right = owner.get(found[name] or "")
        if right is not None and (right in there or right in taken):
            again[name] = right
        elif right is not None:
            taken[right] = name
    missing = expected.keys() - there.keys()
    unused = {name for name in missing if wanted[name] is None and right_status(expected[name]) == "unchanged"}
    unused |= {name for name in there.keys() - expected.keys() if found[name] is None and model.ignored.search(name)}
    return taken, again, frozenset(unused)


def _behind_one_prefix(left: Collection[str], spare: Collection[str]) -> dict[str, str]:
    """Expected name -> name in the file, where one prefix added or taken away gives every one its own."""
    first = next(iter(left), "")
    ways = [("", other.removesuffix(first)) for other in spare if other.endswith(f".{first}")]
    ways += [(first.removesuffix(other), "") for other in spare if first.endswith(f".{other}")]
    for old, new in ways if first else ():
        moved = {name: new + name.removeprefix(old) for name in left if name.startswith(old)}
        if len(moved) == len(left) and {*moved.values()} <= {*spare}:
            return moved
    return {}


def _prefix(right: str, name: str) -> str:
    longer, shorter = (right, name) if len(right) > len(name) else (name, right)
    return longer.removesuffix(shorter)


def _lacking(output: Output, name: str, status: Status, code: str, info: TensorInfo | None = None) -> TensorAudit:
    shape = info.shape if info else output.shape
    return TensorAudit(
        name=name,
        status=status,
        dtype=info.dtype if info else output.dtype,
        shape=shape,
        elements=prod(shape),
        modules=modules_of(output),
        code=code,
    )
