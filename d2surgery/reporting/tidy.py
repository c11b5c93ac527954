"""Tidy tables: measured records as rows of one number each, which CSV files and figures are made of.

Every row says what its number is: of the update or the delta, by which method, along which axis, exact or estimated,
and by which convention, since most of these names mean several things elsewhere.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp, isfinite, log
from typing import TYPE_CHECKING, NamedTuple, TextIO

from d2surgery.measures.table import MEASURES, NUMBERS

if TYPE_CHECKING:  # names and CSV need no torch
    from torch import Tensor

    from d2surgery.measures.drift import Drift
    from d2surgery.measures.likeness import Difference
    from d2surgery.measures.ranks import Spectrum
    from d2surgery.surgery.certificate import Loss

Row = dict[str, str | int | float | None]

COLUMNS = (
    "adapter", "module", "layer", "type", "metric", "index", "value", "null", "standard_error", "quality", "method",
    "of", "axis", "dtype", "convention",
)  # fmt: skip
"""The keys of every row. None where a column does not apply, and for what is undefined (never NaN)."""

CONVENTIONS = {name: measure.formula for name, measure in MEASURES.items()}


_FORMULAS = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")


def write_rows(rows: Iterable[Row], file: TextIO) -> None:
    """Rows as CSV. A text that a spreadsheet would take for a formula (it begins with = + - @, a tab or a line break,
    or apostrophes and then one of these) has one more apostrophe before it: take one off to have it back."""
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for row in rows:
        texts = {name: f"'{v}" for name, v in row.items() if isinstance(v, str) and _FORMULAS.match(v)}
        writer.writerow(row | texts)


# Names ----------------------------------------------------------------------------------------------------------------

_CONTAINERS = frozenset((
    "model", "base_model", "transformer", "layers", "layer", "h", "block", "blocks", "language_model", "text_model",
    "experts",
))  # fmt: skip
"""Parts of names that say where, not what; a type keeps them only where nothing else is left."""


class Address(NamedTuple):
    """Where a module is: its layer, counted from 0, None outside the numbered layers, and the words of its type."""

    layer: int | None
    words: tuple[str, ...]


def address(module: str) -> Address:
    """From the name: `model.layers.3.self_attn.q_proj` is layer 3, self_attn.q_proj; GPT-2's `h.0`, T5's `block.0`.

    The first number is the layer; later ones count experts and sub-blocks. kohya's names have no dots but underscores.
    """
    module = re.sub(r"\[\d+\]$", "", module)  # an expert of a survey
    parts = module.split(".") if "." in module else re.split(r"_(?=\d+(?:_|$))|(?<=\d)_", module)
    layer = next((int(part) for part in parts[:-1] if _is_number(part) and len(part) < 7), None)
    named = [part for part in parts if not _is_number(part)]
    words = tuple(part for part in named if part not in _CONTAINERS)
    return Address(layer, words or (named[-1] if named else module,))


def types(modules: Iterable[str]) -> dict[str, str]:
    """The type of each module: as few last words as tell it from the others, `q_proj`, but `attn.c_proj`."""
    words = {module: address(module).words for module in modules}
    known = set(words.values())
    return {module: _shortest(mine, known) for module, mine in words.items()}


def by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    """Type -> its modules, in their order."""
    groups: dict[str, list[str]] = {}
    for module, type_ in types(modules).items():
        groups.setdefault(type_, []).append(module)
    return groups


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _shortest(mine: tuple[str, ...], known: set[tuple[str, ...]]) -> str:
    for count in range(1, len(mine)):
        if not any(other[-count:] == mine[-count:] for other in known if other != mine):
            return ".".join(mine[-count:])
    return ".".join(mine)


# Records to rows ------------------------------------------------------------------------------------------------------


def spectrum_rows(spectra: "Mapping[str, Spectrum]", nominal: Mapping[str, int | None], adapter: str = "") -> list[Row]:
    """Per module the nominal rank, and every number of the record."""
    rows = []
    for module, type_ in types(spectra).items():
        record = spectra[module]
        common = {"adapter": adapter, "module": module, "layer": address(module).layer, "type": type_}
        told = {"method": record.method, "of": record.of, "dtype": "float64"}
        rank = nominal.get(module)
        if rank is not None:
            rows.append(row(**common, metric="nominal_rank", value=rank, quality="exact"))
        for name in ("numerical_rank", *NUMBERS, "rms_entry"):
            if (value := getattr(record, name)) is not None:
                error, quality = record.standard_errors.get(name), record.quality.get(name, "exact")
                rows.append(row(**common, **told, metric=name, value=value, standard_error=error, quality=quality))
    return rows


def singular_value_rows(spectra: "Mapping[str, Spectrum]", adapter: str = "") -> list[Row]:
    """Per module every singular value, with its index from 1."""
    return [
        row(
            adapter=adapter, module=module, layer=address(module).layer, type=type_, metric="singular_value",
            index=index, value=value, quality="exact", method=spectra[module].method, of=spectra[module].of,
            dtype="float64",
        )
        for module, type_ in types(spectra).items()
        for index, value in enumerate(spectra[module].singular_values.tolist(), 1)
    ]  # fmt: skip


def drift_rows(drifts: "Mapping[str, Drift]", adapter: str = "") -> list[Row]:
    """Per module the means of the record, and the distribution of its signed drift over vectors."""
    rows = []
    for module, type_ in types(drifts).items():
        record = drifts[module]
        common: Row = {"adapter": adapter, "module": module, "layer": address(module).layer, "type": type_}
        common |= {"axis": record.along, "quality": "exact", "method": "structural", "of": "delta"}
        common |= {"dtype": "float32 products, float64 sums"}
        for name in ("relative_update", "delta_magnitude", "delta_direction", "frobenius_norm"):
            rows.append(row(**common, metric=name, value=getattr(record, name)))
        values = {"mean": record.mean_drift} | dict(zip(QUANTILES, quantiles(record.drift), strict=True))
        for index, value in values.items():
            convention = f"{CONVENTIONS['drift']}; {index} over vectors"
            rows.append(row(**common | {"metric": "drift", "index": index, "value": value, "convention": convention}))
    return rows


def difference_rows(differences: "Mapping[str, Difference]", adapters: str = "") -> list[Row]:
    """Per module cosine, subspace similarity of both sides and sign agreement, each beside its null."""
    from d2surgery.measures.likeness import SIDES, phi

    rows = []
    for module, type_ in types(differences).items():
        record = differences[module]
        common: Row = {"adapter": adapters, "module": module, "layer": address(module).layer, "type": type_}
        of = "update" if record.in_features is not None else "delta"
        common |= {"quality": "exact", "method": "structural", "of": of, "dtype": "float64"}
        signs = record.signs
        rows.append(row(**common, metric="cosine", value=record.cosine.value, null=record.cosine.null_sd))
        estimate: Row = {"quality": "estimate", "standard_error": signs.standard_error} if signs.standard_error else {}
        rows.append(row(**common | estimate, metric="sign_agreement", value=signs.share, null=signs.null))
        for side in SIDES:
            if (found := phi(getattr(record, side))) is not None:
                rows.append(row(**common, metric="subspace_similarity", axis=side, value=found[0], null=found[1]))
    return rows


QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


def quantiles(values: "Tensor", shares: Sequence[float] = tuple(QUANTILES.values())) -> list[float | None]:
    """Quantiles (linear between order statistics) of what is not NaN; None where nothing is left."""
    import torch

    known = values[~values.isnan()].double().sort().values
    if not len(known):
        return [None] * len(shares)
    at = torch.tensor(shares, dtype=torch.float64) * (len(known) - 1)
    low, high = known[at.floor().long()], known[at.ceil().long()]
    between: list[float | None] = (low + (at - at.floor()) * (high - low)).tolist()
    return between


def loss_rows(losses: "Mapping[str, Loss]", points: int | None = None) -> list[Row]:
    """Per module what surgery lost, and the least error at each rank; of at most about so many ranks."""
    rows = []
    for module, type_ in types(losses).items():
        record = losses[module]
        common: Row = {"module": module, "layer": address(module).layer, "type": type_, "of": "delta",
                       "quality": "exact", "dtype": "float64"}  # fmt: skip
        for name in ("relative_error", "spectral_error", "weighted_error"):
            if (value := getattr(record, name)) is not None:
                rows.append(row(**common, metric=name, index=record.rank, value=value))
        for k in log_spaced(len(record.curve), points or len(record.curve)):
            rows.append(row(**common, metric="least_error", index=k, value=record.curve[k]))
    return rows


def log_spaced(count: int, most: int) -> list[int]:
    """At most about so many indices below count, dense at the start."""
    if count <= most:
        return list(range(count))
    return sorted({round(exp(i * log(count) / (most - 1))) - 1 for i in range(most)})


def row(**cells: str | int | float | None) -> Row:
    """All COLUMNS, the convention looked up by the metric."""
    convention = CONVENTIONS.get(str(cells["metric"]))
    return {name: _finite(cells.get(name, convention if name == "convention" else None)) for name in COLUMNS}


def _finite(cell: str | int | float | None) -> str | int | float | None:
    return None if isinstance(cell, float) and not isfinite(cell) else cell


def picked(rows: Iterable[Row], *metrics: str, index: str | int | None = None) -> Iterator[Row]:
    """The rows of these metrics that have a value; with an index, only its."""
    return (
        r for r in rows if r["metric"] in metrics and r["value"] is not None and (index is None or r["index"] == index)
    )
