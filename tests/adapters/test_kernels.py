"""What a step launches, shown without a GPU: no look at the data, no wide copy of the weight, so many operations."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2surgery import KINDS
from d2surgery.adapters import forwards
from d2surgery.live.attaching import initial
from d2surgery.live.layers import AdaptedLinear

every_kind = pytest.mark.parametrize("kind", KINDS)
NO_KERNEL = ("view", "permute", "transpose", "slice", "detach", "unsqueeze", "squeeze", "expand", "alias", "select",
             "split", "empty", "prim::", "promote_types", "as_strided", "aten::t")  # fmt: skip


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The kernels that run within, and the largest float32 tensor that any of them makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not any(word in name and (word != "aten::t" or name == word) for word in NO_KERNEL):
            self.kernels.append(name)
        if isinstance(made, Tensor) and made.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, made.numel())
        return made


def layer_of(kind: str, dtype: torch.dtype, size: tuple[int, int] = (512, 384), **options: Any) -> AdaptedLinear:
    linear = nn.Linear(*size, bias=False, dtype=dtype)
    chosen: dict[str, Any] = {"sigma": 0.02} if kind == "duallora" else {}  # the default looks at the base, once
    two = kind in ("duallora", "d2lora")
    (start,) = initial(nn.Sequential(linear), kind, ["0"], rank=4 if two else 8, scaling=1.0, **chosen).values()
    return AdaptedLinear(linear, start, **options)


@contextmanager
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(forwards, "TILE", 1 << 12)
        yield


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@every_kind
def test_a_step_never_looks_at_the_data(kind: str, precision: str) -> None:
    """Under FakeTensorMode an operation whose shape or branch depends on data raises; a GPU would wait there."""
    with FakeTensorMode():
        layer = layer_of(kind, torch.bfloat16 if precision == "bf16" else torch.float32, dropout=0.1)
        optimizer = torch.optim.AdamW(layer.slots.parameters(), foreach=True)
        x = torch.randn(2, 3, 512, dtype=layer.weight.dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
            y = layer(x)
        y.backward(torch.randn_like(y))
        optimizer.step()
        assert x.grad is not None
        assert all(slot.grad is not None for slot in layer.slots.values())


@every_kind
def test_a_step_on_a_sixteen_bit_base_makes_no_wide_copy_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind, torch.bfloat16)
    x = torch.randn(2, 3, 512).to(torch.bfloat16).requires_grad_()
    with small_tiles(monkeypatch), Watched() as seen:
        layer(x).sum().backward()
    assert seen.largest <= 512 * 8  # a tile, or a slot
    assert seen.largest < layer.weight.numel() / 8


def kernels_of_a_step(kind: str, dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    """In the forward and the backward pass of a layer, W0 of one tile."""
    with FakeTensorMode():
        layer = layer_of(kind, dtype, **options)
        x = torch.randn(2, 3, 512, dtype=dtype, requires_grad=True)
        with Watched() as there:
            y = layer(x)
        g = torch.ones_like(y)
        with Watched() as back:
            y.backward(g)
    return len(there.kernels), len(back.kernels)


KERNELS = {"lora": (6, 8), "dora": (21, 17), "d2lora": (26, 27), "duallora": (13, 35)}  # at most, in bfloat16
OVER_LORA = {"dora": 3.5, "d2lora": 5, "duallora": 4.5}  # at most, the two passes together
ON = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16 on a GPU": torch.bfloat16}


@every_kind
def test_so_many_kernels_run_in_a_layers_step(kind: str) -> None:
    """What is launched one by one is what a GPU waits for when it is not compiled."""
    there, back = kernels_of_a_step(kind, torch.bfloat16)
    assert there <= KERNELS[kind][0]
    assert back <= KERNELS[kind][1]


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", OVER_LORA)
def test_a_layers_step_runs_so_many_times_the_kernels_of_loras(
    kind: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on.endswith("GPU"):
        monkeypatch.setattr(forwards, "wide_product", forwards.in_pieces)
    assert sum(kernels_of_a_step(kind, ON[on])) <= OVER_LORA[kind] * sum(kernels_of_a_step("lora", ON[on]))


@every_kind
def test_outside_training_a_layer_runs_little_more_than_the_base(kind: str) -> None:
    layer = layer_of(kind, torch.bfloat16).eval()
    x = torch.randn(1, 1, 512).to(torch.bfloat16)
    with torch.no_grad():
        layer(x)
        with Watched() as seen:
            layer(x)
    assert len(seen.kernels) <= 6, seen.kernels
    assert sum(name in ("aten::mm", "aten::addmm_", "aten::linear") for name in seen.kernels) <= 3


def test_three_bfloat16_pieces_are_a_float32_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies them with float32 sums; here by the exact product of the same pieces, rounded once."""
    torch.manual_seed(0)
    thin = torch.randn(8, 4096) * torch.logspace(-3, 3, 8)[:, None]
    W = torch.randn(4096, 16).to(torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a.double() @ b.double()).to(out_dtype))
    found, wanted = forwards.in_pieces(thin, W), thin.double() @ W.double()
    sizes = thin.double().abs() @ W.double().abs()
    assert float(((found - wanted).abs() / sizes).max()) < 1.4e-7


def test_a_product_in_tiles_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what a float32 sum of 300 products errs in whatever order a library takes them: √300·2⁻²⁴ of their sizes, as
    roundings of either sign add up (Higham and Mary 2019)."""
    torch.manual_seed(0)
    thin, W = torch.randn(8, 300), torch.randn(300, 200).to(torch.bfloat16)
    wanted, sizes = thin.double() @ W.double(), thin.double().abs() @ W.double().abs()
    with small_tiles(monkeypatch):
        for matrix in (W, W.T.contiguous().T):
            found = forwards.wide_product(thin, matrix)
            assert float(((found - wanted).abs() / sizes).max()) < len(W) ** 0.5 * 2**-24
