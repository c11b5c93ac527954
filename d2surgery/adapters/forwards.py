"""Linear maps by an adapted weight that keep little for the backward pass: tensors in, tensors out.

    thin_linear     W0·x + P·(Q·u), or gained: a ⊙ W0 and b ⊙ (P·Q) per row or column (LoRA, DoRA, D2-LoRA)
    signed_linear   W'·x, W' = W0 + ReLU(B·A) ⊙ sign(D·C) formed tile by tile (Dual LoRA); signed_weight that W' itself

Kept are the input, which the layers of a block share, and thin matrices: no value of the weight's size, and no copy of
the weight in another dtype, which is made again instead. W0 is a constant to the gradient. Products over the batch run
in the dtype of the input, or in autocast's where it is on; all others in float32 at least. Where a step has few tokens
it waits for operations to be launched, so they are few; tests/adapters/test_kernels.py counts them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from d2surgery.kinds import Axis as Axis
from d2surgery.kinds import Straight as Straight

Base = Float[Tensor, "out_features in_features"]
Input = Float[Tensor, "*batch in_features"]
Output = Float[Tensor, "*batch out_features"]

CANCELLED = 1e-12
"""‖w+u‖² below this share of ‖w‖² + ‖u‖² is rounding: the vector counts as zero."""
TILE = 1 << 22
"""Entries of the weight that Dual LoRA forms at once: 16 MiB in float32."""


class Gain(NamedTuple):
    """Per vector, a row of W0 or a column: a = target/‖w + u‖ on w, b = a + extra on u. A vector w + u without length
    has a = 0.

    `base_squares` is ‖w‖². The gradient goes to `target`, and through ‖w + u‖ where `learns`.
    """

    target: Float[Tensor, " vectors"]
    base_squares: Float64[Tensor, " vectors"]
    along: Axis
    extra: int
    learns: bool


def thin_linear(
    x: Input,
    base_weight: Base,
    P: Float[Tensor, "out_features rank"],
    Q: Float[Tensor, "rank in_features"],
    *,
    gain: Gain | None = None,
    update_input: Input | None = None,
) -> Output:
    """W0·x + P·(Q·u), with a gain a ⊙ (W0·x) + (b ⊙ P)·(Q·u), or W0·(a ⊙ x) + P·((b ⊙ Q)·u) along the columns; u is
    `update_input`, or x.

    The gradient to the gain of a row is read off the output, which the next layer often keeps anyway; where the gain
    is exactly 0 there is nothing to read, and its gradient is 0.
    """
    dtype = dtype_of_products(x)
    with no_autocast(x):
        return _Thin.apply(x, update_input, base_weight, P, Q, dtype, *(gain or ()))  # type: ignore[no-any-return,no-untyped-call]


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


class Gained(NamedTuple):
    """Of rows w and u = p·Q: the gains, ‖w + u‖² (infinite where it is rounding), and what the gradient needs again."""

    a: Float[Tensor, " vectors"]
    b: Float[Tensor, " vectors"]
    squares: Float64[Tensor, " vectors"]
    products: Float[Tensor, "rank vectors"]  # Q·Wᵀ
    gram: Float[Tensor, "rank rank"]  # Q·Qᵀ


def gained(W: Tensor, P: Tensor, Q: Tensor, gain: Gain) -> Gained:
    """‖w + u‖² = ‖w‖² + Σ_k p_k (2·Q·w + Q·Qᵀ·p)_k: one thin `wide_product` with W, one small product.

    By the Gram matrix and not by QR, whose gradient does not exist at P = 0, where training starts. Sums over r are in
    the dtype of P and err by its rounding of ‖w‖² and ‖u‖², the rest is in float64. Not differentiable.
    """
    W, P, Q = rows_first(W, P, Q, gain.along)
    products, gram = wide_product(Q, W.T).to(P.dtype), Q @ Q.T
    squares = gain.base_squares + (torch.addmm(products, gram, P.T, beta=2) * P.T).sum(0)
    squares.masked_fill_(squares <= 2 * CANCELLED * gain.base_squares, torch.inf)  # ‖u‖² is ‖w‖² there
    a = (gain.target * squares.rsqrt()).to(P.dtype)
    return Gained(a, a + gain.extra if gain.extra else a, squares, products, gram)


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
    pieces = [thin.to(W.dtype)]
    for _ in range(2):
        thin = thin - pieces[-1]
        pieces.append(thin.to(W.dtype))
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


def rows_first(W: Tensor, P: Tensor, Q: Tensor, along: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """The same matrices with the kept axis first: what holds for rows holds for the columns of the transpose."""
    return (W, P, Q) if along == "out_features" else (W.T, Q.T, P.T)


def thin_product(
    x: Tensor, u: Tensor, W: Tensor, P: Tensor, Q: Tensor, a: Tensor | None = None, along: Axis = "out_features"
) -> tuple[Tensor, Tensor]:
    """a ⊙ (W·x) + P·z or W·(a ⊙ x) + P·z, z = Q·u, and z. Not differentiable."""
    of_rows = along == "out_features"
    z = u @ Q.T
    y = (x if of_rows else _times(x, a)) @ W.to(x.dtype).T
    return (_times(y, a) if of_rows else y).addmm_(z, P.T), z


class _Thin(torch.autograd.Function):
    """`thin_linear`. b stands in the factor whose vectors it is of, which is rounded once for both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        W: Tensor,
        P: Tensor,
        Q: Tensor,
        dtype: torch.dtype,
        target: Tensor | None = None,
        base_squares: Tensor | None = None,
        along: Axis = "out_features",
        extra: int = 0,
        learns: bool = False,
    ) -> Tensor:
        ctx.along, ctx.extra, ctx.norm_learns, ctx.wide = along, extra, learns, P.dtype
        ctx.gain_learns = learns or (target is not None and ctx.needs_input_grad[6])
        of_rows, found, kept = along == "out_features", None, ()
        if target is not None and base_squares is not None:
            found = gained(W, P, Q, Gain(target, base_squares, along, extra, learns))
            kept = (P, Q, target, *(found if learns else found[:3]))
            P, Q = (_times(P, found.b[:, None], dtype), Q) if of_rows else (P, _times(Q, found.b, dtype))
        P, Q, rows = P.to(dtype), Q.to(dtype), _rows(x, dtype)
        y, z = thin_product(
            rows, rows if u is None else _rows(u, dtype), W, P, Q, None if found is None else found.a, along
        )
        ctx.save_for_backward(x, u, W, P, Q, z, y if ctx.gain_learns and of_rows else None, *kept)
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, W, P, Q, z, y, *kept = ctx.saved_tensors
        a = kept[3] if kept else None
        of_rows = ctx.along == "out_features"
        with no_autocast(x):
            g = _rows(grads[0], z.dtype)
            h = g @ P
            dP, dQ = g.T @ z, h.T @ _rows(x if u is None else u, g.dtype)
            dx = du = da = dtarget = None
            if ctx.needs_input_grad[0] or (ctx.gain_learns and not of_rows):
                dx = (_times(g, a) if of_rows else g) @ W.to(g.dtype)
                if ctx.gain_learns and not of_rows:
                    da = (_rows(x, dx.dtype) * dx).sum(0, dtype=ctx.wide)
                dx = dx if of_rows else _times(dx, a)
                dx = (dx.addmm_(h, Q) if u is None else dx).view(x.shape).to(x.dtype)
            if u is not None and ctx.needs_input_grad[1]:
                du = (h @ Q).view(u.shape).to(u.dtype)
            if y is not None:
                da = (g * y).sum(0, dtype=ctx.wide)
            if kept:
                dP, dQ, dtarget = _through_gains(ctx, W, dP, dQ, da, *kept)
            return dx, du, None, dP.to(ctx.wide), dQ.to(ctx.wide), None, dtarget, None, None, None, None


def _through_gains(
    ctx: Any, W: Tensor, dP: Tensor, dQ: Tensor, da: Tensor | None, P: Tensor, Q: Tensor, target: Tensor, *found: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to P, Q and the target from those to the gained factors, and from `da`: Σ_t g_t·y_t of rows, of columns
    the gradient to the a before x.

    y = a ⊙ (W·x) + b ⊙ (P·z), so that for rows da = (Σ_t g_t·y_t − (b − a)·db)/a + db with db = Σ_k P_k dP_k. From the
    norm n: da/dn² = −a/2n², and the gradients of n² are 2·(Q·w + Q·Qᵀ·p) to p and p·wᵀ + p·pᵀ·Q twice, summed, to Q.
    """
    a, b, squares, *of_norm = found
    W, P, Q = rows_first(W, P, Q, ctx.along)
    dP, dQ = (dP, dQ) if ctx.along == "out_features" else (dQ.T, dP.T)
    dtarget = None
    if da is not None and ctx.along == "in_features":
        da = da + (P * dP).sum(1)
    elif da is not None:
        da = da.sub_((P * dP).sum(1), alpha=ctx.extra) if ctx.extra else da
        da = da.div_(a).masked_fill_(a == 0, 0)
    dP = dP * b[:, None]
    if da is not None and ctx.needs_input_grad[6]:
        dtarget = (da * squares.rsqrt()).to(target.dtype)
    if da is not None and ctx.norm_learns:
        products, gram = of_norm
        slope = (da * a / squares).to(P.dtype)[:, None]
        weighted = (P * slope).T
        dP.addcmul_(torch.addmm(products, gram, P.T).T, slope, value=-1)
        dQ = dQ.to(P.dtype).sub_(wide_product(weighted, W)).addmm_(weighted @ P, Q, alpha=-1)
    return (dP, dQ, dtarget) if ctx.along == "out_features" else (dQ.T, dP.T, dtarget)


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


def dtype_of_products(x: Tensor) -> torch.dtype:
    """As torch's own linear: autocast leaves float64 alone."""
    lowers = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if lowers else x.dtype


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).reshape(-1, x.shape[-1])


def _times(x: Tensor, gain: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """x ⊙ gain, rounded once to `dtype`, or that of x. Not differentiable."""
    return x if gain is None else torch.mul(x, gain, out=torch.empty_like(x, dtype=dtype))


def _tiles(rows: int, row: int) -> Iterator[slice]:
    """Ranges of rows with at most TILE entries, one row at least."""
    step = max(1, TILE // row)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
