"""Adapters as a whole: everything about one or several of them that a report shows, measured once."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2surgery.checkpoint import Checkpoint, load
from d2surgery.errors import raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.formats.layout import Layout
from d2surgery.machine import trim
from d2surgery.measures.drift import Drift
from d2surgery.measures.likeness import Difference
from d2surgery.measures.ranks import Method, Spectrum
from d2surgery.measures.subspace import Intruders, intruders
from d2surgery.surveying.modules import BaseMatrices, Progress, compare, drifts, places, spectra
from d2surgery.surveying.zeros import zero_problems

Named = Callable[[str], Progress]
"""Gives for a label the function that is told done and total."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Measured:
    """One adapter and all that was measured of it, by module."""

    given: str
    """As the user named it."""
    label: str
    layout: Layout
    nbytes: int
    """Of the adapter's file."""
    sha256: str
    """Of that file."""
    kinds: Mapping[str, str]
    nominal: Mapping[str, int | None]
    spectra: Mapping[str, Spectrum]
    drifts: Mapping[str, Drift]
    """Empty without a base."""
    intruders: Mapping[str, Intruders]
    """Empty unless asked for."""

    def __repr__(self) -> str:
        more = [name for name in ("drifts", "intruders") if getattr(self, name)]
        return f"Measured({self.label!r}: {', '.join([f'{len(self.spectra)} spectra of the {self.of}', *more])})"

    @property
    def of(self) -> str:
        """What its spectra are of: "update", "delta", or both."""
        return " or ".join(sorted({record.of for record in self.spectra.values()}))

    @property
    def sizes(self) -> dict[str, float]:
        """Module -> ‖delta‖F/‖W0‖F where the base is given, else the root mean square of the entries: either can be
        compared between matrices of different shape."""
        if self.drifts:
            return {module: record.relative_update for module, record in self.drifts.items()}
        return {module: record.rms_entry for module, record in self.spectra.items()}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Survey:
    """Adapters, each measured, and each two of them compared."""

    measured: Sequence[Measured]
    shared: Mapping[tuple[int, int], Mapping[str, Difference]]
    """(i, j), i < j -> the differences of the modules that both adapt."""
    base: str | None
    """As the user named it."""

    def __repr__(self) -> str:
        return f"Survey({', '.join(repr(m) for m in self.measured)}; base {self.base})"


def survey(
    adapters: Sequence[str],
    *,
    base: str | Path | None = None,
    method: Method | None = None,
    with_intruders: bool = False,
    exact_signs: bool = False,
    cache: str | Path | None = None,
    progress: Named = lambda label: lambda done, total: None,
) -> Survey:
    """Measure one or more adapters; with a base also how far each moves it.

    with_intruders: all singular vectors of every base weight, slow on large models. exact_signs: see `differences`.
    cache: see `spectra`. Raises what the adapters and the base are refused for.
    """
    weights = BaseWeights(base) if base is not None else None
    checkpoints = [load(adapter, base=weights) for adapter in adapters]
    raise_errors(problem for checkpoint in checkpoints for problem in checkpoint.layout.problems)
    if not all(map(len, checkpoints)):
        raise refuse("UNKNOWN_FORMAT", "an adapter without adapted modules", got=", ".join(adapters))
    measured = [
        measure(checkpoint, weights, given=given, label=label, method=method, with_intruders=with_intruders,
                cache=cache, progress=progress)
        for given, label, checkpoint in zip(adapters, labels(adapters), checkpoints, strict=True)
    ]  # fmt: skip
    shared = compare(checkpoints, exact_signs=exact_signs, progress=progress("comparing"))
    trim()
    return Survey(measured=measured, shared=shared, base=None if base is None else str(base))


def measure(
    checkpoint: Checkpoint,
    base: BaseWeights | None = None,
    *,
    given: str = "",
    label: str = "adapter",
    method: Method | None = None,
    with_intruders: bool = False,
    cache: str | Path | None = None,
    progress: Named = lambda label: lambda done, total: None,
) -> Measured:
    """Everything about one adapter: its spectra, and with a base its drifts and, where asked for, its intruders."""
    found: dict[str, Intruders] = {}
    if base is not None and with_intruders:
        where = BaseMatrices(checkpoint, base)
        for at in places(checkpoint):
            found[at.name] = intruders(checkpoint.adapter(at.module, at.expert or 0), where[at])
    measured = Measured(
        given=given,
        label=label,
        layout=replace(
            checkpoint.layout,
            problems=(*checkpoint.layout.problems, *zero_problems(checkpoint)),
        ),
        nbytes=checkpoint.layout.path.stat().st_size,
        sha256=_sha256(checkpoint.layout.path),
        kinds={at.name: checkpoint.layout.adapters[at.module].kind for at in places(checkpoint)},
        nominal=nominal_ranks(checkpoint),
        spectra=dict(spectra(checkpoint, base, method=method, cache=cache, progress=progress(f"spectra of {label}"))),
        drifts=dict(drifts(checkpoint, base, progress=progress(f"drift of {label}"))) if base is not None else {},
        intruders=found,
    )
    trim()  # what is kept of each module leaves holes in the heap
    return measured


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nominal_ranks(checkpoint: Checkpoint) -> dict[str, int | None]:
    """The nominal rank of every module, by the survey's names; None for a kind without one."""
    return {at.name: checkpoint.layout.adapters[at.module].rank for at in places(checkpoint)}


def labels(adapters: Sequence[str]) -> list[str]:
    """The last part of each path, more of it where several end alike, a number where they are the same."""
    parts = [[part for part in re.split(r"[/\\]", adapter) if part] or [adapter] for adapter in adapters]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({at})" for at, name in enumerate(names, 1)]
