"""Survey: measure every module of an adapter, one at a time, over a base of any size.

Each function yields (name, record), layer 2 before layer 10. A module with several experts is one name per expert:
`module[3]`. Only one base weight is held at a time, read with pread.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import as_bytes, find_device
from d2surgery.files.whole import write_whole
from d2surgery.machine import side_by_side, workers
from d2surgery.measures.drift import Drift, delta_drift
from d2surgery.measures.likeness import Difference, compared, profile
from d2surgery.measures.ranks import Method, Of, Spectrum
from d2surgery.measures.spectrum import delta_spectrum, update_spectrum
from d2surgery.placement.site import Patch, Site
from d2surgery.placement.sites import sites
from d2surgery.surveying.order import in_order

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


class Place(NamedTuple):
    """One adapter of a checkpoint."""

    module: str
    expert: int | None  # None: the module is one matrix

    @property
    def name(self) -> str:
        return self.module if self.expert is None else f"{self.module}[{self.expert}]"


def places(checkpoint: Checkpoint) -> list[Place]:
    """Every adapter of a checkpoint, layer 2 before layer 10."""
    return [
        Place(module, None if entry.experts == 1 else expert)
        for module, entry in in_order(checkpoint.layout.adapters).items()
        for expert in range(entry.experts)
    ]


class BaseMatrices:
    """The base weights that a checkpoint's adapters land on, as (out_features, in_features) in their stored dtype.

    Raises every misfit that `sites` finds.
    """

    def __init__(self, checkpoint: Checkpoint, base: BaseWeights) -> None:
        landing = sites(checkpoint.layout, base.header, base.config)
        raise_errors([*checkpoint.layout.problems, *landing.problems])
        self.base = base
        self.parts: dict[tuple[str, int], list[tuple[Site, Patch]]] = {}
        for site in landing.sites.values():
            for patch in site.patches:
                self.parts.setdefault((patch.module, patch.expert), []).append((site, patch))

    def __getitem__(self, place: Place) -> Tensor:
        """A module that lies in several tensors (an expert's gate and up) is their rows put together."""
        parts = sorted(self.parts[place.module, place.expert or 0], key=lambda part: part[1].out[0])
        pieces = [self._read(site, patch) for site, patch in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, site: Site, patch: Patch) -> Tensor:
        assert site.source is not None
        part = self.base.rows(site.source, patch.start, patch.stop, of=site.matrix[0])
        return part.T if patch.transposed else part


# Spectra ---------------------------------------------------------------------------------------------------------


def spectra(
    checkpoint: Checkpoint,
    base: BaseWeights | None = None,
    *,
    of: Of | None = None,
    method: Method | None = None,
    device: str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, Spectrum]]:
    """The spectrum of every module's update or delta.

    of: None is the delta where it can be had (the base is given, or the kind needs none), else the update; the record
    says which. method: None chooses by kind and size, see `delta_spectrum`. cache: a directory where finished spectra
    of dense deltas are kept by the content of their inputs, so that a second run takes up where the first stopped.

    Raises D2SurgeryError, naming the module: NOT_FINITE, ZERO_NORM, SCALING_UNKNOWN (unknown scaling), what `load` and
    `sites` found, and USAGE for a delta that depends on a base that is not given.
    """
    raise_errors(checkpoint.layout.problems)
    target = find_device(device)
    where = BaseMatrices(checkpoint, base) if base is not None else None
    store = _Cache(Path(cache)) if cache is not None else None

    def measure(place: Place) -> Spectrum:
        adapter = checkpoint.adapter(place.module, place.expert or 0).to(target)
        wanted = of or ("update" if adapter.normalises and where is None else "delta")
        if wanted == "update":
            return update_spectrum(adapter)
        if not adapter.normalises and adapter.update() is not None and method in (None, "structural"):
            return delta_spectrum(adapter, None, method)
        if adapter.normalises and where is None:
            raise refuse("USAGE", "this delta depends on the base weight", wanted="a base", got=adapter.kind)
        weight = where[place] if where is not None and adapter.normalises else None

        def compute() -> Spectrum:
            return delta_spectrum(adapter, None if weight is None else weight.to(target), method)

        return store.get(adapter, weight, method, compute) if store else compute()

    entries = checkpoint.layout.adapters.values()
    updates = all(entry.rank is not None for entry in entries)
    thin = of == "update" or (updates and (where is None or all(entry.axis is None for entry in entries)))
    yield from _each(places(checkpoint), measure, progress, threads=workers() if thin and target.type == "cpu" else 1)


def drifts(
    checkpoint: Checkpoint,
    base: BaseWeights,
    *,
    along: Axis | None = None,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, Drift]]:
    """The drift of every module along an axis; None is each adapter's own, else "out_features"."""
    target = find_device(device)
    where = BaseMatrices(checkpoint, base)

    def measure(place: Place) -> Drift:
        adapter = checkpoint.adapter(place.module, place.expert or 0).to(target)
        return delta_drift(adapter, where[place].to(target), along)

    yield from _each(places(checkpoint), measure, progress)


def differences(
    first: Checkpoint,
    second: Checkpoint,
    *,
    exact_signs: bool = False,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, Difference]]:
    """Of every module that both checkpoints adapt; the others are left out.

    exact_signs: count the signs of all entries of large modules too, which forms them; a sample has a standard error.
    Raises SHAPE_MISMATCH, naming the module, where the two have different shapes, and what `load` found.
    """
    for module, found in comparisons([first, second], exact_signs=exact_signs, progress=progress):
        yield module, found[0, 1]


def comparisons(
    checkpoints: Sequence[Checkpoint],
    *,
    exact_signs: bool = False,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, dict[tuple[int, int], Difference]]]:
    """Of every module that two or more checkpoints adapt, the difference of each two of them, by their numbers.

    Each adapter's factors are read and orthonormalised once, whatever it is compared with. Raises as `differences`.
    """
    raise_errors(problem for checkpoint in checkpoints for problem in checkpoint.layout.problems)
    held = [set(places(checkpoint)) for checkpoint in checkpoints]
    wanted = dict.fromkeys(place for checkpoint in checkpoints for place in places(checkpoint))

    def measure(place: Place) -> dict[tuple[int, int], Difference]:
        seed = crc32(place.name.encode())
        profiles = {
            i: profile(checkpoint.adapter(place.module, place.expert or 0), exact_signs=exact_signs, seed=seed)
            for i, checkpoint in enumerate(checkpoints)
            if place in held[i]
        }
        return {(i, j): compared(profiles[i], profiles[j]) for i, j in combinations(profiles, 2)}

    shared = [place for place in wanted if sum(place in mine for mine in held) > 1]
    thin = all(entry.rank is not None for checkpoint in checkpoints for entry in checkpoint.layout.adapters.values())
    yield from _each(shared, measure, progress, threads=workers() if thin else 1)


def compare(
    checkpoints: Sequence[Checkpoint], *, exact_signs: bool = False, progress: Progress = lambda done, total: None
) -> dict[tuple[int, int], dict[str, Difference]]:
    """`comparisons` by pair: (i, j), i < j -> module -> Difference; empty where two have no module in common."""
    found: dict[tuple[int, int], dict[str, Difference]] = {
        pair: {} for pair in combinations(range(len(checkpoints)), 2)
    }
    for module, pairs in comparisons(checkpoints, exact_signs=exact_signs, progress=progress):
        for pair, record in pairs.items():
            found[pair][module] = record
    return found


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Errors raised within name the module."""
    try:
        yield
    except D2SurgeryError as error:
        problems = (replace(problem, module=problem.module or module) for problem in error.problems)
        raise D2SurgeryError(*problems) from None


# One after another -----------------------------------------------------------------------------------------------


def _each(
    wanted: list[Place], measure: Callable[[Place], Result], progress: Progress, threads: int = 1
) -> Iterator[tuple[str, Result]]:
    """In order."""

    def named(place: Place) -> Result:
        with naming(place.name):
            return measure(place)

    for done, result in enumerate(side_by_side(named, wanted, threads), 1):
        progress(done, len(wanted))
        yield wanted[done - 1].name, result


# Cache -----------------------------------------------------------------------------------------------------------


class _Cache:
    """One JSON file per spectrum, named by the sha256 of all that decides it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(
        self, adapter: Adapter, weight: Tensor | None, method: Method | None, compute: Callable[[], Spectrum]
    ) -> Spectrum:
        """The stored spectrum, else a computed one, then stored. A file that cannot be read counts as absent."""
        path = self.directory / f"{_digest(adapter, weight, method)}.json"
        try:
            return _from_json(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):  # RecursionError is one
            spectrum = compute()
        write_whole(path, json.dumps(_to_json(spectrum)))
        return spectrum


def _digest(adapter: Adapter, weight: Tensor | None, method: Method | None) -> str:
    slots = adapter.slots()
    choices = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in slots}
    digest = hashlib.sha256(json.dumps([version("d2surgery"), adapter.kind, choices, method]).encode())
    for name, tensor in [*slots.items(), *([("base", weight)] if weight is not None else [])]:
        stored = tensor if tensor.is_contiguous() else tensor.T
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.is_contiguous()}".encode())
        digest.update(as_bytes(stored.contiguous().cpu()))
    return digest.hexdigest()


def _to_json(spectrum: Spectrum) -> dict[str, Any]:
    record = {f.name: getattr(spectrum, f.name) for f in fields(spectrum)}
    mappings = {name: dict(value) for name, value in record.items() if isinstance(value, Mapping)}
    return record | mappings | {"singular_values": spectrum.singular_values.tolist()}


def _from_json(record: dict[str, Any]) -> Spectrum:
    values = torch.tensor(record["singular_values"], dtype=torch.float64)
    return Spectrum(**(record | {"singular_values": values, "shape": tuple(record["shape"])}))
