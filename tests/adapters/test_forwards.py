"""Fast forwards: finite differences in float64, the dense reference by torch's own autograd, and what they keep."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2surgery import KINDS
from d2surgery.adapters import DualLoRA, forwards
from d2surgery.adapters.forwards import Gain, signed_linear, thin_linear

OUT, IN, RANK = 7, 11, 3
F64 = torch.float64
STRAIGHT = ("clip", "mask", "identity")


def random(*shape: int, seed: int, size: float = 1.0, dtype: torch.dtype = F64) -> Tensor:
    values = size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return values.to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows or four columns of a 7 × 11 weight: several tiles, and a short one at the end."""
    monkeypatch.setattr(forwards, "TILE", 33)


def learns(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


# ---- thin -----------------------------------------------------------------------------------------------------------


def squares_of(M: Tensor, along: Any) -> Tensor:
    return M.square().sum(1 if along == "out_features" else 0)


def by_hand(x: Tensor, u: Tensor, W: Tensor, P: Tensor, Q: Tensor, gain: Gain | None) -> Tensor:
    """The effective weight, formed, and torch's own gradients of it."""
    if gain is None:
        return x @ W.T + u @ (P @ Q).T
    length = squares_of(W + P @ Q, gain.along).sqrt()
    a = gain.target / (length if gain.learns else length.detach())
    a = a[:, None] if gain.along == "out_features" else a
    return x @ (a * W).T + u @ ((a + gain.extra) * (P @ Q)).T


GAINS = [None, *itertools.product(("out_features", "in_features"), (0, 1), (False, True))]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("gained", GAINS)
@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN)])
@pytest.mark.parametrize("view", [lambda W: W, lambda W: W.T.contiguous().T], ids=["rows", "transposed"])
def test_thin_values_and_gradients_are_the_dense_formulas(
    gained: Any, dropped: bool, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]
) -> None:
    W = view(random(OUT, IN, seed=1))
    target = random(IN if gained and gained[0] == "in_features" else OUT, seed=6)
    given = learns(random(*shape, seed=2), random(*shape, seed=3), random(OUT, RANK, seed=4), random(RANK, IN, seed=5))
    given += learns(target)[: bool(gained)]
    G = random(*shape[:-1], OUT, seed=7)

    def gain_of(target: tuple[Tensor, ...]) -> Gain | None:
        if not target:
            return None
        along, extra, norm_learns = gained
        return Gain(target[0], squares_of(W, along), along, extra, norm_learns)

    def fast(x: Tensor, u: Tensor, P: Tensor, Q: Tensor, *target: Tensor) -> Tensor:
        return thin_linear(x, W, P, Q, gain=gain_of(target), update_input=u if dropped else None)

    def slow(x: Tensor, u: Tensor, P: Tensor, Q: Tensor, *target: Tensor) -> Tensor:
        return by_hand(x, u if dropped else x, W, P, Q, gain_of(target))

    torch.testing.assert_close(fast(*given), slow(*given), rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad((G * f(*given)).sum(), given, allow_unused=True) for f in (fast, slow))
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    if gained and gained[2]:
        assert torch.autograd.gradcheck(fast, given)


@pytest.mark.parametrize(("kind", "along"), [("dora", "out_features"), ("d2lora", "in_features")])
@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 10.0])
def test_float32_values_and_gradients_are_those_of_float64_at_any_size_of_the_update(
    kind: str, along: Any, size: float
) -> None:
    """To a few units of 2⁻²⁴, as every product: norms take their part in float32 and lose nothing more."""
    W, x, G = random(96, 128, seed=1), random(20, 128, seed=2), random(20, 96, seed=3)
    slots = KINDS[kind].init(W, rank=4, scaling=1.0, dtype=F64).slots()
    slots |= {name: random(*slot.shape, seed=4) for name, slot in slots.items() if name != "magnitude"}
    update = KINDS[kind](**slots, scaling=1.0).update()
    assert update is not None
    scaling = size * float(W.norm() / update.dense().norm())

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = learns(*(slot.to(dtype) for slot in slots.values()), x.to(dtype))
        adapter = KINDS[kind](**dict(zip(slots, given, strict=False)), scaling=scaling)
        y = adapter.forward(given[-1], W.to(dtype))
        return [y, *torch.autograd.grad((G.to(dtype) * y).sum(), given)]

    assert KINDS[kind](**slots, scaling=1.0).along == along
    for low, exact in zip(results(torch.float32), results(F64), strict=True):
        assert float(((low - exact).norm() / exact.norm()).detach()) < 16 * 2**-24


def test_a_gain_of_zero_has_gradient_zero_and_no_nan() -> None:
    W, x = random(OUT, IN, seed=1), random(5, IN, seed=2)
    P, Q, target = learns(random(OUT, RANK, seed=4), random(RANK, IN, seed=5), random(OUT, seed=6))
    with torch.no_grad():
        target[3] = 0
    gain = Gain(target, squares_of(W, "out_features"), "out_features", 1, False)
    torch.autograd.backward(thin_linear(x, W, P, Q, gain=gain).square().sum())
    assert target.grad is not None
    assert target.grad[3] == 0
    assert target.grad.isfinite().all()
    assert (target.grad != 0).sum() == OUT - 1


# ---- Dual LoRA ------------------------------------------------------------------------------------------------------


def dual(dtype: torch.dtype = F64, **fields: Any) -> DualLoRA:
    slots: dict[str, Any] = {
        "A": random(RANK, IN, seed=2), "B": random(OUT, RANK, seed=3),
        "C": random(RANK + 1, IN, seed=4), "D": random(OUT, RANK + 1, seed=5),
    }  # fmt: skip
    return DualLoRA(**{name: slot.to(dtype).requires_grad_() for name, slot in slots.items()}, scaling=0.75, **fields)


def gradients_of(y: Tensor, adapter: DualLoRA, *inputs: Tensor) -> list[Tensor]:
    weights = random(*y.shape, seed=9, size=3.0).to(y.dtype)
    return list(torch.autograd.grad((weights * y).sum(), [*adapter.slots().values(), *inputs]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("straight", STRAIGHT)
def test_tiled_dual_lora_is_the_dense_reference_in_values_and_gradients(straight: Any, dropped: bool) -> None:
    """`delta` is dense and its gradients are torch's own, but for the sign's."""
    adapter, W, bias = dual(ste=straight), random(OUT, IN, seed=1), random(OUT, seed=8)
    x, u = learns(random(2, 5, IN, seed=6), random(2, 5, IN, seed=7))
    y = adapter.forward(x, W, bias, u if dropped else None)
    dense = F.linear(x, W, bias) + F.linear(u if dropped else x, adapter.delta(W))
    torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)
    inputs = (x, u) if dropped else (x,)
    wanted = gradients_of(dense, adapter, *inputs)
    for found, want in zip(gradients_of(y, adapter, *inputs), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_tiles")
def test_the_three_gradients_through_the_sign_differ() -> None:
    W, x = random(OUT, IN, seed=1), random(5, IN, seed=6)
    grads = {s: torch.cat([g.flatten() for g in gradients_of(a.forward(x, W), a)]) for s in STRAIGHT
             for a in [dual(ste=s)]}  # fmt: skip
    assert not torch.equal(grads["clip"], grads["mask"])
    assert not torch.equal(grads["clip"], grads["identity"])
    assert not torch.equal(grads["mask"], grads["identity"])


@pytest.mark.usefixtures("small_tiles")
def test_dual_gradients_of_size_and_input_are_finite_differences() -> None:
    W, adapter = random(OUT, IN, seed=1), dual()
    D, C = adapter.D.detach(), adapter.C.detach()
    (x,) = learns(random(5, IN, seed=6))
    assert torch.autograd.gradcheck(lambda x, B, A: signed_linear(x, W, B, A, D, C), (x, adapter.B, adapter.A))


def test_tiles_change_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    W, x, adapter = random(OUT, IN, seed=1), random(5, IN, seed=6), dual()
    whole = adapter.forward(x, W)
    for entries in (1, IN, 3 * IN, 10**6):
        monkeypatch.setattr(forwards, "TILE", entries)
        torch.testing.assert_close(adapter.forward(x, W), whole, rtol=1e-13, atol=1e-13)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def kept(forward: Callable[[], Tensor], *known: Tensor) -> Iterator[tuple[int, ...]]:
    """Shapes of what the backward pass keeps beside `known`."""
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in {t.data_ptr() for t in known}:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return iter(shapes)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_and_no_second_input(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    """One value per token and output feature at most, for DoRA: the output itself."""
    tokens, out, in_, rank = 50, 40, 60, 2
    W, x = random(out, in_, seed=1, dtype=dtype), random(tokens, in_, seed=2, dtype=dtype).requires_grad_()
    adapter = KINDS[kind].init(W, rank=rank, scaling=1.0)
    slots = {name: slot.requires_grad_() for name, slot in adapter.slots().items()}
    adapter = KINDS[kind](**slots, scaling=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = adapter.forward(x, W)
        shapes = list(kept(lambda: adapter.forward(x, W), W, x))
    assert (out, in_) not in shapes
    assert (tokens, in_) not in shapes
    assert shapes.count((tokens, out)) == (kind == "dora")
    assert y.dtype == (torch.bfloat16 if autocast else dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_gradients_are_those_of_float64_to_sixteen_bits(kind: str) -> None:
    out, in_ = 64, 96
    W, x, G = (random(*shape, seed=seed, size=0.1) for seed, shape in enumerate([(out, in_), (50, in_), (50, out)], 1))
    start = KINDS[kind].init(W.float(), rank=4, scaling=1.0, generator=torch.Generator().manual_seed(3))
    values = {
        name: slot + 0.05 * random(*slot.shape, seed=5, dtype=torch.float32) for name, slot in start.slots().items()
    }

    def gradients(dtype: torch.dtype, slot_dtype: torch.dtype) -> list[Tensor]:
        slots = {name: value.to(slot_dtype).requires_grad_() for name, value in values.items()}
        y = KINDS[kind](**slots, scaling=1.0).forward(x.to(dtype), W.to(torch.bfloat16).to(dtype))
        return list(torch.autograd.grad((G.to(dtype) * y).sum(), [*slots.values()]))

    for low, exact in zip(gradients(torch.bfloat16, torch.float32), gradients(F64, F64), strict=True):
        assert low.dtype == torch.float32
        assert float((low - exact).norm() / exact.norm()) < 0.02
