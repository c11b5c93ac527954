"""Spectra: the singular values of an update or a delta, and every rank and norm that follows from them.

Three methods (docs/mathematics.md#spectra). "structural": exact from the factors, never forming (out, in). "exact":
eigenvalues of the float64 Gram matrix on the smaller side. "head-tail": the leading values by a randomized method, all
the others as an estimated distribution (stochastic Golub–Kahan quadrature), with a standard error for every number.
"""

import torch
from torch import Generator, Tensor

from d2surgery.adapters import Adapter, D2LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import refuse
from d2surgery.measures.delta import Delta, cuts
from d2surgery.measures.dense import HEAD, OVERSAMPLING, gram_spectrum, head_tail
from d2surgery.measures.ranks import Method, Of, Spectrum, numerical_rank, ranks, spectrum_of

EXACT_UP_TO = 4096
"""The smaller side up to which the exact method is the default."""


def update_spectrum(adapter: Adapter) -> Spectrum:
    """Of ΔW, exactly, from its factors.

    Raises USAGE for Dual LoRA, which has no thin update, and NOT_FINITE.
    """
    update = adapter.update()
    if update is None:
        raise refuse("USAGE", "it has no thin update; ask for its delta", got=adapter.kind)
    return _structural(update, "update", cancellation(adapter))


def delta_spectrum(
    adapter: Adapter,
    base_weight: Tensor | None,
    method: Method | None = None,
    *,
    generator: Generator | None = None,
) -> Spectrum:
    """Of W' − W0. Dual LoRA and kinds that do not normalise need no base weight.

    method: None is "structural" where the delta is the update, else "exact" up to EXACT_UP_TO on the smaller side and
    "head-tail" above. A matrix too small for a head and a tail is done exactly, and the record says so. Raises
    NOT_FINITE, ZERO_NORM, and USAGE where the base weight is missing or the delta has no structure.
    """
    update = adapter.update()
    is_update = update is not None and not adapter.normalises
    method = method or ("structural" if is_update else _default_method(adapter))
    if method == "structural":
        if update is None or not is_update:
            raise refuse("USAGE", "the spectrum of this delta needs the exact or head-tail method", got=adapter.kind)
        return _structural(update, "delta", cancellation(adapter))
    delta = Delta(adapter, base_weight)
    if method == "head-tail" and min(delta.shape) > 2 * (HEAD + OVERSAMPLING):
        return head_tail(delta.dense(torch.float32), cancellation=cancellation(adapter), generator=generator)
    return gram_spectrum(delta.tiles(), delta.shape, cancellation=cancellation(adapter))


def cancellation(adapter: Adapter) -> float | None:
    """(‖ΔW₊‖ + ‖ΔW₋‖)/‖ΔW‖: 1 where a branch is alone, never less, large where the branches nearly cancel."""
    if not isinstance(adapter, D2LoRA):
        return None
    update = adapter.update()
    split = adapter.A_plus.shape[0]
    plus, minus = LowRank(update.P[:, :split], update.Q[:split]), LowRank(update.P[:, split:], update.Q[split:])
    whole = float(update.frobenius_norm())
    return (float(plus.frobenius_norm()) + float(minus.frobenius_norm())) / whole if whole else None


def matrix_spectrum(matrix: Tensor) -> Spectrum:
    """The exact spectrum of any matrix, taken as a delta."""
    shape = matrix.shape[0], matrix.shape[1]
    tall = shape[0] >= shape[1]
    tiles = (matrix[cut] if tall else matrix[:, cut] for cut in cuts(max(shape), min(shape)))
    return gram_spectrum(tiles, shape)


def _structural(update: LowRank, of: Of, cancels: float | None) -> Spectrum:
    sigma, rounding = update.values_and_rounding()
    sigma = sigma.cpu()
    return spectrum_of(
        of=of,
        method="structural",
        shape=update.shape,
        singular_values=sigma,
        numerical_rank=numerical_rank(sigma, update.shape),
        error_bound=rounding / float(sigma[0]) if sigma.numel() and sigma[0] > 0 else 0.0,
        cancellation=cancels,
        **ranks(sigma),
    )


def _default_method(adapter: Adapter) -> Method:
    return "exact" if min(adapter.out_features, adapter.in_features) <= EXACT_UP_TO else "head-tail"
