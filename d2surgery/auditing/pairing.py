"""Which tensor of a merged checkpoint should be which output of the merge: by names and ties, from headers only."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from d2surgery.auditing.findings import Status, TensorAudit
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import FLOATS, TensorInfo
from d2surgery.files.tensors import DTYPES
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.tiles import Output
from d2surgery.placement.ties import find_tie, tie_flag


@dataclass(frozen=True)
class TensorPair:
    """A tensor of the merged file and what it should be; `output` in the dtype of the file."""

    name: str
    output: Output
    info: TensorInfo
    status: Status  # when it is right
    otherwise: str = "TENSOR_CHANGED"  # the code when it is not, of a tied one

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


def pair_up(prepared: Prepared, merged: BaseWeights) -> Pairing:
    """Each expected output with the tensor that holds it; what is missing, extra, resized or of another nature."""
    there = merged.header.tensors
    expected = {output.name: output for output in prepared.outputs}
    names = _match(expected, there)
    ties = find_tie(merged.header, merged.config)
    pairs: list[TensorPair] = []
    others: dict[str, TensorAudit] = {}
    for name, output in expected.items():
        status, otherwise = right_status(output), "TENSOR_CHANGED"
        found = names.get(name)
        if found is None and ties.aliases.get(name) in there and tie_flag(merged.config) is not False:
            found, status = ties.aliases[name], "tied"
            otherwise = "TIE_DOUBLED" if prepared.fit.landing.untied else "TENSOR_MISSING"
        if found is None:
            others[name] = _lacking(output, name, "missing", "TENSOR_MISSING")
        elif there[found].shape != output.shape:
            others[found] = _lacking(output, found, "resized", "TENSOR_RESIZED", there[found])
        elif output.dtype in FLOATS and there[found].dtype not in FLOATS:
            others[found] = _lacking(output, found, "changed", "REQUANTIZED", there[found])
        elif output.dtype not in FLOATS and there[found].dtype != output.dtype:
            others[found] = _lacking(output, found, "changed", "TENSOR_CHANGED", there[found])
        else:
            written = output._replace(dtype=there[found].dtype)
            pairs.append(TensorPair(name if status == "tied" else found, written, there[found], status, otherwise))
    own_ties = find_tie(prepared.fit.base.header, prepared.fit.base.config).aliases
    for name in sorted(there.keys() - set(names.values())):
        info, source = there[name], expected.get(own_ties.get(name, ""))
        if source is not None and source.shape == info.shape and info.dtype in FLOATS:
            pairs.append(TensorPair(name, source._replace(dtype=info.dtype), info, "tied"))
        else:
            others[name] = TensorAudit(
                name=name, status="extra", dtype=info.dtype, shape=info.shape, elements=prod(info.shape),
                code="TENSOR_EXTRA",
            )  # fmt: skip
    left = [name for name in ties.aliases if name not in there]
    return Pairing(tuple(pairs), others, frozenset(ties.aliases[name] for name in left), tied=bool(left))


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


def _match(expected: Mapping[str, Output], there: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Expected name -> name in the file: the same, or with the prefix that fits most added or taken away."""
    names = {name: name for name in expected if name in there}
    left = [name for name in expected if name not in names]
    spare = there.keys() - names.keys()
    ways: Counter[tuple[str, str]] = Counter()
    for name in left:
        for other in spare:
            if name.endswith(f".{other}"):
                ways[name.removesuffix(other), ""] += 1
            elif other.endswith(f".{name}"):
                ways["", other.removesuffix(name)] += 1
    for (old, new), _ in ways.most_common():
        for name in left:
            other = new + name.removeprefix(old)
            if name not in names and name.startswith(old) and other in spare:
                names[name] = other
                spare = spare - {other}
    return names


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
