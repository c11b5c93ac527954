"""The layer that stands in the place of a frozen linear layer, with an adapter over it.

    y = F.linear(x, W0 + delta, bias)      with x dropped out where the update alone reads it

A linear layer is torch's Linear, transformers' Conv1D, or bitsandbytes' Linear4bit and Linear8bitLt, whose W0 is the
dequantised weight.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from d2surgery.adapters import Adapter
from d2surgery.adapters.adapter import Prepared
from d2surgery.adapters.forwards import Axis, dtype_of_products
from d2surgery.adapters.vectors import Weight, squared_norms
from d2surgery.errors import Problem, raise_errors, refuse

FEW = 64
"""Rows of an input up to which the weight that Dual LoRA forms is kept for the next one: decoding, not scoring."""


class OverFrozen(nn.Module):
    """What stands in the place of a linear layer, which it freezes.

    The norms of W0 are summed once. So is, outside training and without gradients, all that does not depend on the
    input, until a slot, the warm-up, the base or the mode (`train`, `eval`) changes; a change through `.data` is not
    seen before that. Of Dual LoRA that is a weight as large as W0, which is kept for inputs of few rows only.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        keep_unpacked(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.warmup: Tensor | None = None
        self.base_squares: dict[Axis, Tensor] = {}
        self._prepared: dict[Any, tuple[Any, Prepared]] = {}
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        self.train(base_layer.training)

    @property
    def base_weight(self) -> Weight:
        """W0 as (out_features, in_features)."""
        return base_weight(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """The base layer's, as it stores it: models ask a layer for its weight's dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def adapters(self) -> list[Adapter]:
        """The values around the live parameters."""
        raise NotImplementedError

    def warm(self, w: float) -> None:
        """Multiply the scaling by w from now on."""
        if self.warmup is None:
            if w == 1:
                return
            self.warmup = torch.ones((), dtype=torch.float64, device=self.weight.device)
        self.warmup.fill_(w)  # the same tensor at every step: a compiled model needs no other graph

    def warmed(self, scaling: float) -> float | Tensor:
        return scaling if self.warmup is None else scaling * self.warmup

    def through(self, adapter: Adapter, x: Tensor, update_input: Tensor | None) -> Tensor:
        """The adapter's forward over the base layer."""
        W0 = self.base_weight
        prepared = self._ready(adapter, x, W0) if update_input is None else None
        if prepared is not None:
            y = prepared(x, W0)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        with _made_again(W0, self.base_layer) if is_quantized(self.base_layer) else nullcontext():
            return adapter.forward(x, W0, self.bias, update_input, self._squares(adapter, W0))

    def remember_squares(self) -> None:
        """Sum the norms again: the base or the adapters are others. Those of a weight that is spread over processes
        (FSDP2) or not loaded yet wait for the first forward, which has it whole."""
        self._prepared = {}
        self.base_squares = {}
        if self.weight.is_meta or hasattr(self.weight, "full_tensor"):
            return
        for adapter in self.adapters():
            self._squares(adapter, self.base_weight)

    def train(self, mode: bool = True) -> "OverFrozen":
        self._prepared = {}
        return super().train(mode)

    def _squares(self, adapter: Adapter, W0: Tensor) -> Tensor | None:
        axis = adapter.along if adapter.normalises else None
        if axis is None:
            return None
        if axis not in self.base_squares:
            with torch.inference_mode(False), torch.no_grad():
                self.base_squares[axis] = squared_norms(W0.detach(), axis)
        return self.base_squares[axis]

    def _ready(self, adapter: Adapter, x: Tensor, W0: Tensor) -> Prepared | None:
        """What was computed before for these very tensors, or is now; None where the forward is to compute it."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        quantized = is_quantized(self.base_layer)
        if adapter.prepares_weight and (quantized or x.numel() > FEW * x.shape[-1]):
            return None
        watched = [*adapter.slots().values(), *([] if quantized else [self.weight])]
        watched += [] if self.warmup is None else [self.warmup]
        if any(tensor.is_inference() for tensor in watched):  # they do not count their changes
            return None
        dtype, scaling = dtype_of_products(x), None if isinstance(adapter.scaling, Tensor) else adapter.scaling
        place = tuple(tensor.data_ptr() for tensor in watched)
        state = ([tensor._version for tensor in watched], dtype, scaling, adapter.settings)
        found = self._prepared.get(place)
        if found is None or found[0] != state:
            found = self._prepared[place] = state, adapter.prepared(W0, dtype, self._squares(adapter, W0))
        return found[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OverFrozen":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        check_device(self.weight.device)
        self.warmup = None if self.warmup is None else self.warmup.to(self.weight.device)
        self.remember_squares()  # the weight may have another dtype or device now
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is computed once is computed again in a copy."""
        return self.__dict__ | {"_prepared": {}}


class AdaptedLinear(OverFrozen):
    """A frozen linear layer and the slots of one adapter, as parameters.

    `warmup` is a factor on the scaling; a snapshot has it folded in.
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter, *, dropout: float = 0.0, trainable: bool = True):
        super().__init__(base_layer)
        device = next(base_layer.parameters()).device
        check_device(device)
        self.slots = nn.ParameterDict(
            {
                name: _parameter(slot, device, trainable and name not in adapter.frozen)
                for name, slot in adapter.slots().items()
            }
        )
        self.dropout = dropout
        self._kind = type(adapter)
        self._fields = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in self.slots}
        self.remember_squares()

    @property
    def adapter(self) -> Adapter:
        """The value around the live parameters."""
        chosen = {**self._fields, "scaling": self.warmed(self._fields["scaling"])}
        return self._kind(**chosen, **{name: self.slots[name] for name in self._kind.dimensions})

    def adapters(self) -> list[Adapter]:
        return [self.adapter]

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        update_input = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return self.through(self.adapter, x, update_input)

    def extra_repr(self) -> str:
        return f"kind={self._kind.kind}, dropout={self.dropout}"


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on it. MultiheadAttention reads the weight of its out_proj past its forward."""
    is_torchs = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    return is_torchs or is_a(module, "transformers", "Conv1D")


def is_quantized(layer: nn.Module) -> bool:
    return is_a(layer, "bitsandbytes", "Linear4bit") or is_a(layer, "bitsandbytes", "Linear8bitLt")


def base_weight(layer: nn.Module) -> Weight:
    """W0 of a linear layer as (out_features, in_features), dequantised where it is quantised."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if is_a(layer, "transformers", "Conv1D"):
        return weight.T
    if is_a(layer, "bitsandbytes", "Linear4bit"):
        from bitsandbytes.functional import dequantize_4bit

        if _is_packed(layer):
            raise refuse("REPACKED_BASE", "the layer has run before an adapter was attached", got=f"{layer}")
        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return,attr-defined]
    if is_a(layer, "bitsandbytes", "Linear8bitLt"):
        state: Any = layer.state  # holds the scales once the layer has run, its weight before
        scale: Tensor = weight.SCB if state.SCB is None else state.SCB  # type: ignore[attr-defined]
        return weight.data.float() * (scale.float() / 127)[:, None]
    return weight


def check_device(device: torch.device) -> None:
    """Raises NO_DOUBLE_PRECISION for a device whose norms and signs would be less exact than is said here."""
    if device.type == "mps":
        raise refuse(
            "NO_DOUBLE_PRECISION", "norms and signs are computed in float64", got=str(device), wanted="cpu or cuda"
        )


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), also where the weight is packed."""
    return (layer.nf, layer.nx) if is_a(layer, "transformers", "Conv1D") else (layer.out_features, layer.in_features)  # type: ignore[return-value]


def _made_again(W0: Tensor, layer: nn.Module) -> saved_tensors_hooks:
    """Keep no dequantised weight for the backward pass: the layer gives it again there."""
    address = W0.data_ptr()

    def pack(tensor: Tensor) -> Any:
        return (tensor.shape, tensor.stride()) if tensor.data_ptr() == address else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else base_weight(layer).as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)


def keep_unpacked(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs a 4-bit layer for good when it first runs in evaluation mode. The
    scales are rounded then and no gradient passes: layers without an adapter would cut off those below them."""
    layers = {name: layer for name, layer in model.named_modules() if is_a(layer, "bitsandbytes", "Linear4bit")}
    raise_errors(
        Problem(code="REPACKED_BASE", message="the layer has run before an adapter was attached", module=name)
        for name, layer in layers.items() if _is_packed(layer)
    )  # fmt: skip
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # what bitsandbytes asks before it packs


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _after_loading(layer: OverFrozen, _: Any) -> None:
    layer.remember_squares()


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """By name: the package is imported where its layers are made, not here."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)


def _parameter(slot: Tensor, device: torch.device, trainable: bool) -> nn.Parameter:
    dtype = torch.promote_types(slot.dtype, torch.float32) if trainable else slot.dtype
    device = slot.device if device.type == "meta" else device
    return nn.Parameter(slot.detach().to(device, dtype, copy=True), requires_grad=trainable)
