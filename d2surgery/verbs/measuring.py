"""`d2surgery.spectrum`, `drift`, `diff`: every module of adapters given by path, measured as on the command line."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from d2surgery.adapters.forwards import Axis
from d2surgery.checkpoint import Checkpoint, load
from d2surgery.errors import found_in, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.kinds import TABLE
from d2surgery.measures.drift import Drift
from d2surgery.measures.likeness import SIDES, Difference, Likeness, closest, likeness, phi
from d2surgery.measures.ranks import NUMBERS, Method, Of, Spectrum
from d2surgery.reporting.tidy import address, types
from d2surgery.surveying.adapter import labels, nominal_ranks
from d2surgery.surveying.modules import compare, drifts, spectra
from d2surgery.tables import Tabular

if TYPE_CHECKING:
    from d2surgery.reporting.figures.parts import Plot

Path = str | os.PathLike[str]
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Modules(Tabular, Mapping[str, Record], Generic[Record]):
    """Module -> what was measured of it, layer 2 before layer 10."""

    adapter: str
    """Its label: the last part of the path."""
    kinds: tuple[str, ...]
    records: Mapping[str, Record]

    def __contains__(self, module: object) -> bool:
        return module in self.records

    def __getitem__(self, module: str) -> Record:
        return found_in(self.records, module, "module")

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        what = " and ".join(TABLE[kind].title for kind in self.kinds)
        return f"{type(self).__name__}({what} {self.adapter!r}, {len(self)} modules: {self._words()})"

    def rows(self) -> Sequence[dict[str, Any]]:
        of = types(self.records)
        return [
            {"module": module, "layer": address(module).layer, "type": of[module], **self._numbers(module)}
            for module in self.records
        ]

    def figures(self) -> "dict[str, Plot]":
        """Name -> a plotly figure with its caption and table, as the report has them."""
        from d2surgery.reporting.figures.parts import named  # plotly, and only where figures are drawn

        return {plot.name: named(plot, self.adapter) for plot in self._plots()}

    @abstractmethod
    def _words(self) -> str: ...
    @abstractmethod
    def _numbers(self, module: str) -> dict[str, Any]: ...
    @abstractmethod
    def _plots(self) -> "list[Plot]": ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spectra(Modules[Spectrum]):
    """Module -> singular values, norms and every rank."""

    nominal: Mapping[str, int | None]

    def _words(self) -> str:
        used = [record.energy_entropy_rank for record in self.records.values()]
        room = [rank for rank in self.nominal.values() if rank]
        of = f" of {sum(room) / len(room):.3g}" if room else ""
        return f"rank used {sum(used) / max(len(used), 1):.3g}{of}"

    def _numbers(self, module: str) -> dict[str, Any]:
        record = self.records[module]
        numbers = {name: getattr(record, name) for name in ("numerical_rank", *NUMBERS, "rms_entry", "of", "method")}
        return {"nominal_rank": self.nominal.get(module), **numbers}

    def _plots(self) -> "list[Plot]":
        from d2surgery.reporting.figures import spectra as figures  # plotly

        drawn = [draw(self.records, self.nominal) for draw in (figures.rank_map, figures.rank_lines,
                                                               figures.spectrum_fan)]  # fmt: skip
        return [*drawn, figures.size_map(self.records)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Drifts(Modules[Drift]):
    """Module -> how far it moves the base, in length and in direction."""

    def _words(self) -> str:
        sizes = [record.relative_update for record in self.records.values()]
        return f"moves the base by {100 * sum(sizes) / max(len(sizes), 1):.3g} % on average"

    def _numbers(self, module: str) -> dict[str, Any]:
        names = ("along", "relative_update", "mean_drift", "delta_magnitude", "delta_direction", "frobenius_norm")
        return {name: getattr(self.records[module], name) for name in names}

    def _plots(self) -> "list[Plot]":
        from d2surgery.reporting.figures import drifts as figures  # plotly

        every = (figures.drift_by_depth, figures.drift_distribution, figures.magnitude_direction,
                 figures.relative_update_map)  # fmt: skip
        return [draw(self.records) for draw in every]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Tabular):
    """What every two of some adapters have in common, module by module."""

    names: tuple[str, ...]
    pairs: Mapping[tuple[int, int], Mapping[str, Difference]]
    """(i, j), i < j -> module -> what they have in common; empty where they share no module."""

    @property
    def wholes(self) -> dict[tuple[int, int], Likeness]:
        """(i, j) -> over all modules together."""
        return {at: likeness(modules) for at, modules in self.pairs.items()}

    def __repr__(self) -> str:
        wholes = self.wholes
        if len(wholes) == 1:
            (whole,) = wholes.values()
            return f"Comparison({self.names[0]!r} and {self.names[1]!r}: {whole!r})"
        return f"Comparison({len(self.names)} adapters, {len(wholes)} pairs)"

    def rows(self) -> Sequence[dict[str, Any]]:
        return [
            {"first": self.names[i], "second": self.names[j], "module": module, "cosine": record.cosine.value,
             **{f"phi_{side}": (phi(getattr(record, side)) or (None,))[0] for side in SIDES},
             "sign_agreement": record.signs.share, "sign_standard_error": record.signs.standard_error}
            for (i, j), modules in self.pairs.items()
            for module, record in modules.items()
        ]  # fmt: skip

    def figures(self) -> "dict[str, Plot]":
        """Name -> figure; those against depth of the most alike pairs only, by pair."""
        from d2surgery.reporting.figures import likeness as figures  # plotly

        matrix = figures.similarity_matrix(self.names, self.wholes)
        found = {matrix.name: matrix}
        for i, j in closest(self.wholes, figures.MOST_PAIRS):
            two = (self.names[i], self.names[j])
            for draw in (figures.similarity_by_depth, figures.subspaces_by_depth):
                plot = draw(self.pairs[i, j], two)
                found[f"{plot.name} {i} {j}"] = plot
        return found


def spectrum(
    adapter: Path,
    base: Path | None = None,
    *,
    of: Of | None = None,
    method: Method | None = None,
    device: str = "cpu",
    cache: Path | None = None,
) -> Spectra:
    """Singular values, norms and every rank of each module's update or delta; see `spectra` for the choices."""
    weights = BaseWeights(base) if base is not None else None
    checkpoint = _opened(adapter, weights)
    found = dict(spectra(checkpoint, weights, of=of, method=method, device=device, cache=cache))
    return Spectra(**_whose(adapter, checkpoint), records=found, nominal=nominal_ranks(checkpoint))


def drift(adapter: Path, base: Path, *, along: Axis | None = None, device: str = "cpu") -> Drifts:
    """How far each module moves the length and the direction of the base's vectors; `delta_drift` is of one matrix."""
    weights = BaseWeights(base, dequantized=True)
    checkpoint = _opened(adapter, weights)
    return Drifts(**_whose(adapter, checkpoint), records=dict(drifts(checkpoint, weights, along=along, device=device)))


def diff(*adapters: Path, exact_signs: bool = False) -> Comparison:
    """What two or more adapters have in common: cosines, shared directions, signs, beside what chance gives."""
    if len(adapters) < 2:
        raise refuse(
            "USAGE", "one adapter has nothing to be compared with", wanted="two or more", got=f"{len(adapters)}"
        )
    pairs = compare([_opened(adapter, None) for adapter in adapters], exact_signs=exact_signs)
    return Comparison(names=tuple(labels([os.fspath(adapter) for adapter in adapters])), pairs=pairs)


def _opened(adapter: Path, base: BaseWeights | None) -> Checkpoint:
    checkpoint = load(os.fspath(adapter), base=base)
    raise_errors(checkpoint.layout.problems)
    return checkpoint


def _whose(adapter: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"adapter": labels([os.fspath(adapter)])[0], "kinds": tuple(checkpoint.layout.kinds)}
