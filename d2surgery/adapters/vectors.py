"""Numbers per vector of a weight, its rows or its columns: norms, products with an update, gains."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from d2surgery.adapters.forwards import CANCELLED, Axis, at_least_float32, no_autocast
from d2surgery.errors import refuse

Weight = Float[Tensor, "out_features in_features"]


SUSPICIOUS = 0.1
"""Below this share, the sums are repeated over w + u itself, in float64."""


BLOCK = 32


class Triple(NamedTuple):
    """Per vector along an axis, in float64: ‖w‖², <w,u>, ‖u‖², w of the base weight and u of the update."""

    base: Float64[Tensor, " vectors"]
    cross: Float64[Tensor, " vectors"]
    update: Float64[Tensor, " vectors"]

    def plus(self, other: "Triple") -> "Triple":
        """The triple of two disjoint tiles of the same vectors."""
        return Triple(self.base + other.base, self.cross + other.cross, self.update + other.update)


class Gains(NamedTuple):
    """Per vector, in float64: W' = (1 + base_excess)·w + update_gain·u. The excess is kept to spare 1 + tiny − 1."""

    base_excess: Float64[Tensor, " vectors"]
    update_gain: Float64[Tensor, " vectors"]


def squared_norms(base_weight: Weight, along: Axis) -> Float64[Tensor, " vectors"]:
    """‖w‖² of every vector along the axis."""
    return row_sums(at_least_float32(base_weight if along == "out_features" else base_weight.T).square())


def triple_of_rows(W: Tensor, P: Tensor, Q: Tensor) -> Triple:
    """Per row: ‖w_i‖², <w_i,u_i> = Σ_k P_ik (Q·Wᵀ)_ki, ‖u_i‖². Products in W's dtype, sums in float64."""
    with no_autocast(W):
        cross = (P.T * (Q.to(W.dtype) @ W.T)).sum(0)
        return Triple(row_sums(W * W), cross, norms_by_qr(P, Q))


def triple_of_cancelling_rows(W: Tensor, P: Tensor, Q: Tensor) -> Triple:
    """As `triple_of_rows`, in float64, where w + u is small beside both: ‖w+u‖² is summed over w + u itself, and ‖w‖²
    takes up what rounding leaves of the rest. Of three sums that cancel, the order of summing would decide."""
    W = W.double()
    cross, update = (P.T * (Q @ W.T)).sum(0), norms_by_qr(P, Q)
    return Triple((W + P @ Q).square().sum(1) - 2 * cross - update, cross, update)


def norms_by_qr(P: Tensor, Q: Tensor) -> Tensor:
    """‖u_i‖² = ‖R·P_iᵀ‖² with Qᵀ = (orthonormal)·R: exact also where the branches of an update nearly cancel."""
    R: Tensor = torch.linalg.qr(Q.T, mode="r").R
    return (R @ P.T).square().sum(0)


def row_sums(values: Tensor) -> Tensor:
    """Float64 sums over dim 1: blocks of 32 in the dtype of the values, then blocks in float64 (error about 1e-8)."""
    if values.dtype == torch.float64:
        return values.sum(1)
    if is_transposed(values):  # summing its rows as columns is 20 times faster
        return _blocked_sums(values.T, 0)
    return _blocked_sums(values, 1)


def row_squares(W: Tensor) -> Tensor:
    """‖w‖² per row in float64, as `row_sums(W * W)`: of contiguous rows in one pass, without the squares."""
    if W.dtype == torch.float64 or is_transposed(W):
        return row_sums(W * W)
    body, tail = torch.split(W, [W.shape[1] // BLOCK * BLOCK, W.shape[1] % BLOCK], 1)
    norms: Tensor = torch.linalg.vector_norm(torch.unflatten(body, 1, (-1, BLOCK)), dim=2)
    return norms.double().square().sum(1) + tail.double().square().sum(1)


def _blocked_sums(values: Tensor, dim: int) -> Tensor:
    blocks, rest = divmod(values.shape[dim], BLOCK)
    body, tail = torch.split(values, [blocks * BLOCK, rest], dim)
    sums: Tensor = torch.unflatten(body, dim, (blocks, BLOCK)).sum(dim + 1).double().sum(dim)
    return sums + tail.double().sum(dim)


def _sum_squares(triple: Triple) -> Tensor:
    """‖w+u‖²."""
    return triple.base + 2 * triple.cross + triple.update


def sum_norm(triple: Triple) -> Tensor:
    """‖w+u‖, with 1 in place of zero: any finite gain leaves a zero vector zero."""
    return torch.where(_is_zero(triple), 1, _sum_squares(triple)).sqrt()


def _is_zero(triple: Triple) -> Tensor:
    return _sum_squares(triple) <= CANCELLED * (triple.base + triple.update)


def doubtful(triple: Triple) -> Tensor:
    return (_sum_squares(triple) < SUSPICIOUS * (triple.base + triple.update)).nonzero()[:, 0]


def refuse_zero_norms(triple: Triple, target: Tensor, along: Axis | None) -> None:
    bad = (_is_zero(triple) & (target != 0)).nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise refuse("ZERO_NORM", f"Vectors of length zero along {along}: {shown}.", wanted="a direction to rescale")


def product_like(W: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """P·Q, lying in memory as W does: adding two layouts is slow."""
    return (Q.T @ P.T).T if is_transposed(W) else P @ Q


def is_transposed(W: Tensor) -> bool:
    return W.stride(0) < W.stride(1)
