"""What surgery is asked for: how many ranks to keep, how several adapters become one. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from d2surgery.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor

By = Literal["energy", "error", "sv_fro", "sv_cumulative", "sv_ratio", "above"]
Method = Literal["exact", "svd", "slerp", "ties", "dare", "della", "magnitude", "tsv", "iso-c"]
Space = Literal["entries", "knots", "core"]
METHODS: tuple[Method, ...] = ("exact", "svd", "slerp", "ties", "dare", "della", "magnitude", "tsv", "iso-c")


class Known(Protocol):
    """What is known of a matrix's singular values: see `truncation.Triplets`."""

    @property
    def sigma(self) -> "Tensor": ...
    @property
    def energy(self) -> float: ...
    @property
    def complete(self) -> bool: ...
    @property
    def side(self) -> int: ...
    def left(self) -> "Tensor": ...
    def summed(self) -> "Tensor": ...


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How many singular values to keep: the fewest that reach `value` by a criterion, and no more than `rank`.

    by   "energy"         Σ_{i≤k} σ² ≥ value · Σσ²
         "error"          the error √Σ_{i>k} σ² ≤ value · √Σσ²
         "sv_fro"         √Σ_{i≤k} σ² ≥ value · √Σσ²         kohya's names and meaning; its script then keeps one
         "sv_cumulative"  Σ_{i≤k} σ ≥ value · Σσ             more than that (`extra=1`)
         "sv_ratio"       σ_k > σ₁/value
         "above"          σ_k > value, such as the edge of what rounding alone gives

    Raises D2SurgeryError USAGE for a value out of range.
    """

    rank: int | None = None
    by: By | None = None
    value: float = 0.0
    extra: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise refuse("USAGE", "a rank", wanted="1 or more", got=str(self.rank))
        if self.by == "sv_ratio" and not self.value >= 1:
            raise refuse("USAGE", "sv_ratio: the largest singular value over the least to keep", wanted="1 or more",
                         got=str(self.value))  # fmt: skip
        if self.by not in (None, "sv_ratio", "above") and not 0 <= self.value <= 1:
            raise refuse("USAGE", f"{self.by}: a share", wanted="0 to 1", got=str(self.value))

    def count(self, found: Known) -> int | None:
        """How many of the triplets; None where more of them have to be known to tell."""
        known, most = len(found.sigma), found.side if self.rank is None else self.rank
        enough = self._enough(found)
        if enough is None and not found.complete and known < most:
            return None
        return min(most if enough is None else enough + self.extra, most, known)

    def _enough(self, found: Known) -> int | None:
        """The fewest that reach the value; None where those that are known do not tell."""
        sigma = found.sigma
        if self.by is None:
            return None
        if self.by in ("sv_ratio", "above"):
            count = int((sigma > (self.value if self.by == "above" else sigma[:1] / self.value)).sum())
            return count if found.complete or count < len(sigma) else None
        if self.by == "sv_cumulative":
            running = found.summed()
            reached = (running >= self.value * running[-1]) & found.complete
        else:
            allowed = {"energy": 1 - self.value, "error": self.value**2, "sv_fro": 1 - self.value**2}[self.by]
            reached = found.left() <= allowed * found.energy
        return int((~reached).sum()) if bool(reached.any()) else None


ALL = Keep()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How deltas D₁, D₂, … with weights w₁, w₂, … become one.

    exact      Σ wᵢDᵢ; from factors without loss, at the sum of the ranks or less
    svd        the best approximation of Σ wᵢDᵢ of the rank that `keep` gives
    slerp      along the arc between two of them: (sin((1−t)Ω)·D₁ + sin(tΩ)·D₂)/sin Ω, t = w₂/(w₁ + w₂), Ω their angle
    magnitude  Σ wᵢ·top(Dᵢ): the largest entries, a share `density` of each
    ties       the same, of each entry's values only those of the sign with more weight, their mean (arXiv:2306.01708)
    dare       Σ wᵢ·mask·Dᵢ/density, each entry kept with probability `density` (arXiv:2311.03099)
    della      as dare, larger entries likelier: probabilities from density − ε to density + ε along the ranks of the
               entries of a row, ε half of the room that there is (arXiv:2406.11617)
    tsv        the leading 1/n of each one's directions, made orthogonal to the others' (arXiv:2412.00081)
    iso-c      Σ wᵢDᵢ with all its singular values made their mean (arXiv:2502.04959)

    space: where ties, dare, della and magnitude choose: among the "entries" of the matrices; in "knots", the entries of
    the parts of Vᵀ in the SVD of [D₁ … Dₙ] (arXiv:2410.19735); in "core", the entries of the cores in bases of all the
    factors (arXiv:2509.17786). The last two are as small as the ranks.
    """

    method: Method = "exact"
    keep: Keep = ALL
    density: float = 0.5
    space: Space = "entries"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise refuse("USAGE", "no such method", wanted=", ".join(METHODS), got=self.method)
        if not 0 < self.density <= 1:
            raise refuse("USAGE", "density: the share of entries that stays", wanted="above 0, 1 at most",
                         got=str(self.density))  # fmt: skip
