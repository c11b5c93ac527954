"""Several adapters as one: exact sums, and the methods that choose among entries or directions."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import acos, sin, sqrt

import torch
from torch import Generator, Tensor

from d2surgery.adapters import LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import refuse
from d2surgery.measures.delta import cuts
from d2surgery.surgery.certificate import Form, Loss, loss, tile, truncation_loss
from d2surgery.surgery.choices import Recipe
from d2surgery.surgery.truncation import triplets

ENTRYWISE = ("ties", "dare", "della", "magnitude")


@torch.no_grad()
def combined(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str = "") -> tuple[LoRA, Loss]:
    """One LoRA for all, and its error against what the method gives before it is cut to a rank. `module` gives dare
    and della a seed of their own.

    Raises D2SurgeryError USAGE for what a method cannot take: slerp of other than two; tsv, knots and core of a delta
    without factors, as those of kinds that normalise are.
    """
    whole = _METHODS[recipe.method](deltas, weights, recipe, module)
    found = triplets(whole, recipe.keep)
    count = recipe.keep.count(found)
    A, B = found.factors(len(found.sigma) if count is None else count)
    made = LoRA(A=A.float(), B=B.float(), scaling=1.0)
    if isinstance(whole, LowRank):
        return made, truncation_loss(found, made)
    curve, largest = found.curve(), found.largest
    return made, loss(whole, made.update(), len(A), curve=curve, largest=largest, into=whole)


def weighted_sum(deltas: Sequence[Form], weights: Sequence[float]) -> LowRank | Tensor:
    """Σ wᵢDᵢ: of factors their concatenation, else formed, its entries rounded once to float32."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        first, *others = (w * d for d, w in zip(deltas, weights, strict=True) if isinstance(d, LowRank))
        for other in others:
            first = first + other
        return first
    return _by_rows(deltas, lambda tiles: _total([w * each for w, each in zip(weights, tiles, strict=True)]))


def _by_rows(deltas: Sequence[Form | Tensor], of: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What comes of the same rows of all, of which only a few at a time are formed: in float32, cores as they are."""
    first = deltas[0]
    whole = torch.empty(first.shape, dtype=first.dtype if isinstance(first, Tensor) else torch.float32)
    for part in cuts(*whole.shape):
        whole[part] = of([tile(delta, part) for delta in deltas])
    return whole


def _sum(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str) -> LowRank | Tensor:
    return weighted_sum(deltas, weights)


def _slerp(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str) -> LowRank | Tensor:
    if len(deltas) != 2 or min(weights) < 0 or sum(weights) <= 0:
        raise refuse("USAGE", "slerp", wanted="two adapters with weights ≥ 0", got=f"{list(weights)}")
    t = weights[1] / sum(weights)
    inner, norms = _inner(*deltas), [sqrt(max(_inner(each, each), 0.0)) for each in deltas]
    cosine = inner / (norms[0] * norms[1]) if all(norms) else 1.0
    if abs(cosine) > 1 - 1e-9:  # one line: the arc is the chord
        return weighted_sum(deltas, [1 - t, t])
    angle = acos(cosine)
    return weighted_sum(deltas, [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)])


def _inner(one: Form, other: Form) -> float:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return float(one.inner(other))
    return sum(float((one.tile(out=part) * other.tile(out=part)).sum()) for part in cuts(*one.shape))


# Entries --------------------------------------------------------------------------------------------------------------


def _entrywise(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str) -> LowRank | Tensor:
    """Some choice among the entries, of the matrices or of what stands for them in a smaller space."""
    if recipe.space == "entries":
        return _chosen(deltas, weights, recipe, module)
    factors = [_factors(delta, recipe.space) for delta in deltas]
    left = torch.linalg.qr(torch.cat([P for P, _ in factors], 1)).Q
    if recipe.space == "knots":  # [D₁ … Dₙ] = U Σ [V₁ᵀ … Vₙᵀ]
        cores = [(left.T @ P) @ Q for P, Q in factors]  # (R, in)
        U, sigma, Vh = torch.linalg.svd(torch.cat(cores, 1), full_matrices=False)
        parts = list(Vh.split([Q.shape[1] for _, Q in factors], 1))
        return LowRank(left @ (U * sigma), _chosen(parts, weights, recipe, module))
    right = torch.linalg.qr(torch.cat([Q for _, Q in factors]).T).Q
    cores = [(left.T @ P) @ (Q @ right) for P, Q in factors]
    return LowRank(left @ _chosen(cores, weights, recipe, module), right.T)


def _factors(delta: Form, what: str) -> tuple[Tensor, Tensor]:
    if not isinstance(delta, LowRank):
        raise refuse("USAGE", f"{what} needs deltas with factors", wanted="LoRA", got="a delta that needs the base")
    return delta.P.double(), delta.Q.double()


def _chosen(matrices: Sequence[Form | Tensor], weights: Sequence[float], recipe: Recipe, module: str) -> Tensor:
    keep: list[Callable[[Tensor], Tensor]]
    if recipe.method in ("dare", "della"):
        names = (f"{recipe.seed} {module} {number}" for number in range(len(matrices)))
        keep = [partial(_kept_at_random, recipe=recipe, generator=_generator(name)) for name in names]
    else:
        keep = [partial(_kept_from, edge=_edge(each, recipe.density)) for each in matrices]

    def of(tiles: list[Tensor]) -> Tensor:
        parts = [weight * kept(each) for weight, kept, each in zip(weights, keep, tiles, strict=True)]
        return _elected(parts, weights) if recipe.method == "ties" else _total(parts)

    return _by_rows(matrices, of)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _edge(matrix: Form | Tensor, density: float) -> float:
    """The least size, in float32, of those that stay; of equal ones at the edge all stay.

    Bits of floats above zero are in their order: found among the upper 16 of all, then among the lower of those there.
    """
    count = matrix.shape[0] * matrix.shape[1]
    below = min(count - round(density * count), count - 1)
    if below < 1:
        return 0.0
    upper, below = _nth((bits >> 16 for bits in _size_bits(matrix)), below)
    lower, _ = _nth((bits[bits >> 16 == upper] & 0xFFFF for bits in _size_bits(matrix)), below)
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def _kept_from(rows: Tensor, edge: float) -> Tensor:
    return torch.where(rows.float().abs() >= edge, rows, 0.0)


def _size_bits(matrix: Form | Tensor) -> Iterator[Tensor]:
    for part in cuts(*matrix.shape):
        yield tile(matrix, part).float().abs().view(torch.int32).flatten()


def _nth(pieces: Iterable[Tensor], place: int) -> tuple[int, int]:
    """The value that comes after `place` others in order, of whole numbers below 2^16, and how many equal ones do."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in pieces:
        counts += torch.bincount(piece, minlength=1 << 16)
    ends = counts.cumsum(0)
    value = int(torch.searchsorted(ends, place, right=True))
    return value, place - int(ends[value] - counts[value])


def _elected(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Per entry the sign of the sum, and the weighted mean of the values that have it, times the sum of all weights:
    where all agree, it is their weighted sum."""
    sign = _total(parts).sign()
    total, share = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agrees = part.sign() == sign
        total += torch.where(agrees, part, 0.0)
        share += torch.where(agrees & (part != 0), abs(weight), 0.0)
    return total * (sum(map(abs, weights)) / share.clamp(min=torch.finfo(share.dtype).tiny)).where(share > 0, 0.0)


def _kept_at_random(rows: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    probability = torch.full_like(rows, recipe.density)
    if recipe.method == "della":
        room = min(recipe.density, 1 - recipe.density) / 2
        order = rows.abs().argsort(dim=1).argsort(dim=1).to(rows)
        probability += room * (2 * order / max(rows.shape[1] - 1, 1) - 1)
    drawn = torch.rand(rows.shape, generator=generator).to(rows)
    return torch.where(drawn < probability, rows / probability, 0.0)


# Directions -----------------------------------------------------------------------------------------------------------


def _tsv(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str) -> LowRank:
    parts = []
    for delta, weight in zip(deltas, weights, strict=True):
        U, sigma, Vh = LowRank(*_factors(delta, "tsv")).svd()
        count = -(-len(sigma) // len(deltas))
        parts.append((U[:, :count], weight * sigma[:count], Vh[:count]))
    U, sigma, V = (torch.cat([part[i] for part in parts], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
    return LowRank(_nearest_orthonormal(U) * sigma, _nearest_orthonormal(V.T).T)


def _nearest_orthonormal(columns: Tensor) -> Tensor:
    """U·Vᵀ of the SVD (Procrustes)."""
    U, _, Vh = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = U @ Vh
    return nearest


def _iso(deltas: Sequence[Form], weights: Sequence[float], recipe: Recipe, module: str) -> LowRank:
    found = triplets(weighted_sum(deltas, weights), recipe.keep)
    count = recipe.keep.count(found)
    kept = len(found.sigma) if count is None else count
    mean = found.sigma[:kept].mean() if kept else 0.0
    return LowRank(found.U[:, :kept] * mean, found.Vh[:kept])


def _generator(name: str) -> Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


_METHODS: dict[str, Callable[[Sequence[Form], Sequence[float], Recipe, str], LowRank | Tensor]] = {
    "exact": _sum,
    "svd": _sum,
    "slerp": _slerp,
    **dict.fromkeys(ENTRYWISE, _entrywise),
    "tsv": _tsv,
    "iso-c": _iso,
}
