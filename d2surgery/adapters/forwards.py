"""Linear maps by an adapted weight that keep little for the backward pass: tensors in, tensors out.

    thin_linear     W0·x + P·(Q·u), with a gain per row or column on W0 (LoRA, DoRA, D2-LoRA)
    signed_linear   W'·x, W' = W0 + ReLU(B·A) ⊙ sign(D·C) formed tile by tile (Dual LoRA); signed_weight that W' itself
    sums            <w, u> and ‖u‖² per row w of W0 and u of P·Q

Kept are the input, which the layers of a block share, and thin matrices: no value of the weight's size, and no copy of
the weight in another dtype, which is made again instead. W0 is a constant to the gradient. Products over the batch run
in the dtype of the input, or in autocast's where it is on; all others in float32 at least.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from d2surgery.kinds import Axis as Axis
from d2surgery.kinds import Straight as Straight

Base = Float[Tensor, "out_features in_features"]
Input = Float[Tensor, "*batch in_features"]
Output = Float[Tensor, "*batch out_features"]

TILE = 1 << 22
"""Entries of the weight that Dual LoRA forms at once: 16 MiB in float32."""


def thin_linear(
    x: Input,
    base_weight: Base,
    P: Float[Tensor, "out_features rank"],
    Q: Float[Tensor, "rank in_features"],
    *,
    gain: Float[Tensor, " vectors"] | None = None,
    along: Axis = "out_features",
    update_input: Input | None = None,
) -> Output:
    """gain ⊙ (W0·x) + P·(Q·u), or W0·(gain ⊙ x) + P·(Q·u) along the columns; u is `update_input`, or x.

    The gradient to the gain of a row is read off the output, which the next layer often keeps anyway; where the gain
    is exactly 0 there is nothing to read, and its gradient is 0.
    """
    dtype = dtype_of_products(x)
    with no_autocast(x):
        return _Thin.apply(x, update_input, base_weight, P, Q, gain, along, dtype)  # type: ignore[no-any-return,no-untyped-call]


def signed_linear(
    x: Input,
    base_weight: Base,
    B: Float[Tensor, "out_features rank1"],
    A: Float[Tensor, "rank1 in_features"],
    D: Float[Tensor, "out_features rank2"],
    C: Float[Tensor, "rank2 in_features"],
    *,
    straight: Straight = "clip",
    update_input: Input | None = None,
) -> Output:
    """(W0 + ReLU(B·A) ⊙ sign(D·C))·x, or W0·x + (ReLU(B·A) ⊙ sign(D·C))·u with an `update_input` u.

    The weight is formed in row tiles, and in column tiles for the gradient, and rounded to the dtype of the products.
    In 16 bits W0 and the update are rounded apart, and summed where the products are: W0 + an update below half a unit
    of it would be W0 again.
    """
    dtype = dtype_of_products(x)
    with no_autocast(x):
        return _Signed.apply(x, update_input, base_weight, B, A, D, C, straight, dtype)  # type: ignore[no-any-return,no-untyped-call]


def signed_weight(
    base_weight: Base,
    B: Float[Tensor, "out_features rank1"],
    A: Float[Tensor, "rank1 in_features"],
    D: Float[Tensor, "out_features rank2"],
    C: Float[Tensor, "rank2 in_features"],
    dtype: torch.dtype,
    *,
    negative: bool = False,
) -> Base:
    """W0 ± ReLU(B·A) ⊙ sign(D·C) as `signed_linear` forms it for products in `dtype`; in 16 bits without W0."""
    formed = torch.empty(base_weight.shape, dtype=dtype, device=base_weight.device)
    with no_autocast(base_weight):
        for tile in _tiles(*base_weight.shape):
            delta = signed((B[tile] @ A).relu_(), D[tile] @ C)
            delta = -delta if negative else delta
            formed[tile] = delta if rounds_away(dtype) else base_weight[tile] + delta
    return formed


def rounds_away(dtype: torch.dtype) -> bool:
    """Whether W0 + delta in this dtype loses updates that training has to see."""
    return dtype.itemsize < 4


@dataclass
class Clipped:
    """Entries of the sign matrices that gradients came to, and of them those that "clip" or "mask" changed."""

    entries: int = 0
    changed: Tensor | int = 0

    @property
    def share(self) -> float | None:
        return float(self.changed) / self.entries if self.entries else None


_counts: list[Clipped] = []  # no context variable: backward passes have threads of their own


@contextmanager
def counting_clipped() -> Iterator[Clipped]:
    """What the gradients through Dual LoRA's signs lose in backward passes within; not of compiled models."""
    found = Clipped()
    _counts.append(found)
    try:
        yield found
    finally:
        _counts.remove(found)


def sums(
    W: Float[Tensor, "vectors others"], P: Float[Tensor, "vectors rank"], Q: Float[Tensor, "rank others"]
) -> tuple[Float64[Tensor, " vectors"], Float64[Tensor, " vectors"]]:
    """<w_i, u_i> = Σ_k P_ik (Q·Wᵀ)_ki and ‖u_i‖² = P_i (Q·Qᵀ) P_iᵀ for the rows of W and of U = P·Q.

    One thin `wide_product` with W, everything else in float64. By the Gram matrix and not by QR, whose
    gradient does not exist at P = 0, where training starts.
    """
    with no_autocast(W):
        return _Sums.apply(W, P, Q)  # type: ignore[no-any-return,no-untyped-call]


def wide_product(thin: Float[Tensor, "rank inner"], W: Float[Tensor, "inner outer"]) -> Float[Tensor, "rank outer"]:
    """thin·W in float32 at least, without a copy of a 16-bit W in it.

    In bfloat16 on a GPU: `thin` as three bfloat16 pieces, which hold its 24 bits, summed in float32; else W is widened
    tile by tile.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    thin = thin.to(wide)
    if W.dtype == wide:
        return thin @ W
    if W.dtype == torch.bfloat16 and W.is_cuda:
        return in_pieces(thin, W)
    product = thin.new_empty(len(thin), W.shape[1])
    for tile in _tiles(W.shape[1], len(W)):
        product[:, tile] = thin @ W[:, tile].to(wide)
    return product


def in_pieces(thin: Float[Tensor, "rank inner"], W: Float[Tensor, "inner outer"]) -> Float[Tensor, "rank outer"]:
    """thin·W, W in bfloat16: each product of pieces is exact in float32, in which they are summed."""
    pieces = []
    for _ in range(3):
        pieces.append(thin.to(W.dtype))
        thin = thin - pieces[-1]
    products: Tensor = torch.mm(torch.cat(pieces[::-1]), W, out_dtype=thin.dtype)
    return products.view(3, len(thin), -1).sum(0)


def signed(size: Tensor, z: Tensor) -> Tensor:
    """size where z > 0, else −size; both are overwritten, since fresh memory costs more here than the arithmetic.

    The least normal number is taken off z, so that a zero of either sign counts as negative. `torch.where` on random
    signs is five times slower.
    """
    return size.copysign_(z.sub_(torch.finfo(z.dtype).tiny).to(size.dtype))


def straight_through(grad: Tensor, z: Tensor, straight: Straight) -> Tensor:
    """dL/dz from dL/dsign(z)."""
    if straight == "clip":
        return grad.clamp(-1, 1)
    return grad * (z.abs() <= 1) if straight == "mask" else grad


def _count(grad: Tensor, z: Tensor, straight: Straight) -> None:
    if torch.compiler.is_compiling() or not _counts:
        return
    changed = {"clip": grad.abs() > 1, "mask": z.abs() > 1, "identity": torch.zeros_like(z, dtype=torch.bool)}[straight]
    for found in _counts:
        found.entries += changed.numel()
        found.changed = found.changed + changed.sum()


def no_autocast(x: Tensor) -> torch.autocast:
    """Norms and signs keep their precision in mixed-precision training."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))


class _Thin(torch.autograd.Function):
    """y = r ⊙ (W·(c ⊙ x)) + P·(Q·u), where r or c is the gain and the other 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        W: Tensor,
        P: Tensor,
        Q: Tensor,
        gain: Tensor | None,
        along: Axis,
        dtype: torch.dtype,
    ) -> Tensor:
        row_gain, column_gain = (gain, None) if along == "out_features" else (None, gain)
        z = _rows(x if u is None else u, dtype) @ Q.to(dtype).T
        y = _times(_rows(x, dtype), column_gain) @ W.to(dtype).T
        y = _times(y, row_gain).addmm_(z, P.to(dtype).T)
        ctx.save_for_backward(x, u, W, P, Q, gain, z, y if ctx.needs_input_grad[5] and row_gain is not None else None)
        ctx.along = along
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, W, P, Q, gain, z, y = ctx.saved_tensors
        row_gain, column_gain = (gain, None) if ctx.along == "out_features" else (None, gain)
        with no_autocast(x):
            g = _rows(grads[0], z.dtype)
            h = g @ P.to(g.dtype)
            dP = (g.T @ z).to(P.dtype)
            dQ = (h.T @ _rows(x if u is None else u, g.dtype)).to(Q.dtype)
            dx = du = dgain = None
            if ctx.needs_input_grad[0] or (column_gain is not None and ctx.needs_input_grad[5]):
                dx = _times(g, row_gain) @ W.to(g.dtype)
                if ctx.needs_input_grad[5] and column_gain is not None:
                    dgain = (_rows(x, dx.dtype) * dx).sum(0, dtype=gain.dtype)
                dx = _times(dx, column_gain)
                dx = (dx.addmm_(h, Q.to(g.dtype)) if u is None else dx).view(x.shape).to(x.dtype)
            if y is not None:
                dgain = _row_gain_gradient(gain, g, y, P, dP)
            if u is not None and ctx.needs_input_grad[1]:
                du = (h @ Q.to(g.dtype)).view(u.shape).to(u.dtype)
        return dx, du, None, dP, dQ, dgain, None, None


def _row_gain_gradient(gain: Tensor, g: Tensor, y: Tensor, P: Tensor, dP: Tensor) -> Tensor:
    """Σ_t g_ti (W·x_t)_i, where gain ⊙ (W·x) = y − P·z and Σ_t g_ti (P·z_t)_i = Σ_k P_ik dP_ik."""
    total = (g * y).sum(0, dtype=gain.dtype) - (P * dP).sum(1)
    return torch.where(gain == 0, 0, total / gain)


class _Signed(torch.autograd.Function):
    """y = W·x + delta·u, delta = ReLU(B·A) ⊙ sign(D·C); without u, (W + delta)·x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        W: Tensor,
        B: Tensor,
        A: Tensor,
        D: Tensor,
        C: Tensor,
        straight: Straight,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, u, W, B, A, D, C)
        ctx.straight, ctx.dtype = straight, dtype
        ctx.apart = apart = u is not None or rounds_away(dtype)
        rows = _rows(x, dtype)
        rows = torch.cat([rows, rows if u is None else _rows(u, dtype)], 1) if apart else rows
        y = rows.new_empty(len(rows), len(W))
        for tile in _tiles(len(W), W.shape[1]):
            delta = signed((B[tile] @ A).relu_(), D[tile] @ C)
            weight = torch.cat([W[tile].to(dtype), delta.to(dtype)], 1) if apart else W[tile].add(delta).to(dtype)
            y[:, tile] = rows @ weight.T
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, W, B, A, D, C = ctx.saved_tensors
        with no_autocast(x):
            g = _rows(grads[0], ctx.dtype)
            rows = _rows(x if u is None else u, ctx.dtype)
            drows = torch.empty_like(rows)
            twice = torch.cat([g, g], 1) if ctx.apart and u is None else g
            dB, dA, dD, dC = (torch.zeros_like(slot) for slot in (B, A, D, C))
            for tile in _tiles(W.shape[1], len(W)):
                size, z = (B @ A[:, tile]).relu_(), D @ C[:, tile]
                sign = signed(torch.ones_like(size), z.clone())
                weight = size * sign if ctx.apart else W[:, tile] + size * sign
                weight = (
                    torch.cat([W[:, tile].to(g.dtype), weight.to(g.dtype)]) if twice is not g else weight.to(g.dtype)
                )
                drows[:, tile] = twice @ weight
                dweight = (g.T @ rows[:, tile]).to(size.dtype)
                dsize = dweight * sign * (size > 0)
                dsign = dweight * size
                _count(dsign, z, ctx.straight)
                dz = straight_through(dsign, z, ctx.straight)
                dB += dsize @ A[:, tile].T
                dA[:, tile] = B.T @ dsize
                dD += dz @ C[:, tile].T
                dC[:, tile] = D.T @ dz
            dinput = drows.view(x.shape).to(x.dtype)
            if u is None:
                return dinput, None, None, dB, dA, dD, dC, None, None
            return (g @ W.to(g.dtype)).view(x.shape).to(x.dtype), dinput, None, dB, dA, dD, dC, None, None


class _Sums(torch.autograd.Function):
    """Keeps P and Q as they are, which the forward keeps too, and not in float64."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        products = wide_product(Q, W.T)
        ctx.save_for_backward(W, P, Q, products)
        P, Q = P.double(), Q.double()
        return (P.T * products).sum(0), ((P @ (Q @ Q.T)) * P).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (W, P, Q, products), (gcross, gupdate) = ctx.saved_tensors, grads
        with no_autocast(W):
            P64, Q64 = P.double(), Q.double()
            weighted = 2 * gupdate[:, None] * P64
            dP = (products * gcross).T + weighted @ (Q64 @ Q64.T)
            dQ = wide_product((P64 * gcross[:, None]).T, W) + (P64.T @ weighted) @ Q64
            return None, dP.to(P.dtype), dQ.to(Q.dtype)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """As torch's own linear: autocast leaves float64 alone."""
    lowers = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if lowers else x.dtype


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).reshape(-1, x.shape[-1])


def _times(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else (x * gain).to(x.dtype)


def _tiles(rows: int, row: int) -> Iterator[slice]:
    """Ranges of rows with at most TILE entries, one row at least."""
    step = max(1, TILE // row)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
