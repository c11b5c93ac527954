"""What adapters have in common before they are combined, and what that makes of their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

from d2surgery.adapters.lowrank import LowRank
from d2surgery.checkpoint import Checkpoint
from d2surgery.measures.likeness import Difference, Likeness, likeness
from d2surgery.surgery.choices import Keep
from d2surgery.surgery.combining import weighted_sum
from d2surgery.surgery.rebuilding import no_progress
from d2surgery.surgery.truncation import triplets
from d2surgery.surveying.modules import Progress, differences, naming, places


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Of updates M₁, M₂, … with weights w₁, w₂, …, over all modules; of Dual LoRA of the deltas."""

    pairs: Mapping[tuple[int, int], Likeness]
    kept: tuple[float, ...]
    """Of each, <Σ wⱼMⱼ, wᵢMᵢ>/‖wᵢMᵢ‖²: 1 where the others do not touch it, more where they add to it, less where they
    take from it."""
    energy: float
    """‖Σ wⱼMⱼ‖²/Σ ‖wⱼMⱼ‖²: 1 for adapters that have nothing to do with each other."""
    error: float | None
    """Of Σ wⱼMⱼ cut to the ranks asked for, relative; None where none were, or an update has no factors."""

    def in_words(self) -> str:
        """Whether combining makes sense."""
        least = min(self.kept, default=1.0)
        if least > 1.25:
            return "they say much the same, and add up: weights that sum to 1 keep their strength"
        if least > 0.8:
            return "they hardly touch each other: each does in the sum what it does alone"
        if least > 0.3:
            return "they take from each other: some of what one learnt is undone by the others"
        return "they cancel: of one of them next to nothing is left, and a sum makes little sense"


def sharing(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    keep: Keep | None = None,
    *,
    progress: Progress = no_progress,
) -> Sharing:
    """Measured on factors, without combining anything. Raises SHAPE_MISMATCH, and what `load` found."""
    numbers = range(len(checkpoints))
    inner = [[0.0] * len(checkpoints) for _ in numbers]
    pairs: dict[tuple[int, int], Likeness] = {}
    for i, j in combinations(numbers, 2):
        found: dict[str, Difference] = dict(differences(checkpoints[i], checkpoints[j], progress=progress))
        pairs[i, j] = likeness(found)
        products = (d.cosine.value * d.norms[0] * d.norms[1] for d in found.values() if all(d.norms))
        inner[i][j] = inner[j][i] = weights[i] * weights[j] * sum(products)
    error, energies = _cut(checkpoints, weights, keep)
    for i in numbers:
        inner[i][i] = energies[i]
    kept = tuple(sum(inner[i]) / inner[i][i] if inner[i][i] else 1.0 for i in numbers)
    apart = sum(energies)
    return Sharing(pairs=pairs, kept=kept, energy=sum(map(sum, inner)) / apart if apart else 1.0, error=error)


def _cut(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], keep: Keep | None
) -> tuple[float | None, list[float]]:
    """The relative error of the sums cut to these ranks, and ‖wᵢMᵢ‖² of each."""
    energies = [0.0] * len(checkpoints)
    whole = left = 0.0
    thin = True
    for place in dict.fromkeys(place for each in checkpoints for place in places(each)):
        updates: list[LowRank] = []
        shares: list[float] = []
        with naming(place.name):
            for i, each in enumerate(checkpoints):
                if place.module in each.layout.adapters:
                    update = each.adapter(place.module, place.expert or 0).update()
                    thin = thin and update is not None
                    if update is not None:
                        updates.append(update)
                        shares.append(weights[i])
                        energies[i] += (weights[i] * float(update.frobenius_norm())) ** 2
            if keep is not None and updates:
                found = triplets(weighted_sum(updates, shares), keep)
                whole += found.energy
                left += float(found.left()[keep.count(found) or 0])
    return (sqrt(left / whole) if keep is not None and thin and whole else None), energies
