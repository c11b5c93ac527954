"""Adapters live in a torch model: `attach` puts an AdaptedLinear in the place of each linear layer, `detach` ends it.

    y = F.linear(x, W0 + delta, bias)      with x dropped out where the update alone reads it

A linear layer is torch's Linear, transformers' Conv1D, or bitsandbytes' Linear4bit and Linear8bitLt, whose W0 is the
dequantised weight. The base is frozen; slots are trained in float32 at least, and autocast decides what is computed
lower.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from d2surgery.adapters import KINDS, Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.vectors import Weight, squared_norms
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import Problem, brief, raise_errors, refuse
from d2surgery.formats.layout import About
from d2surgery.formats.patterns import BadExpression, Matcher

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # of transformers' classifiers, which have no output embeddings


class OverFrozen(nn.Module):
    """What stands in the place of a linear layer, which it freezes. The norms of W0 are summed once."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        _keep_unpacked(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.warmup: Tensor | None = None
        self.base_squares: dict[Axis, Tensor] = {}
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

    def warmed(self, scaling: float) -> float | Tensor:
        return scaling if self.warmup is None else scaling * self.warmup

    def through(self, adapter: Adapter, x: Tensor, update_input: Tensor | None) -> Tensor:
        """The adapter's forward over the base layer."""
        W0 = self.base_weight
        squares = self.base_squares[adapter.along] if adapter.along and adapter.normalises else None
        with _made_again(W0, self.base_layer) if is_quantized(self.base_layer) else nullcontext():
            return adapter.forward(x, W0, self.bias, update_input, squares)

    def remember_squares(self) -> None:
        """Sum the norms again: the base or the adapters are others."""
        axes = {adapter.along for adapter in self.adapters() if adapter.along and adapter.normalises}
        self.base_squares = {axis: squared_norms(self.base_weight.detach(), axis) for axis in axes}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OverFrozen":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.warmup = None if self.warmup is None else self.warmup.to(self.weight.device)
        self.remember_squares()  # the weight may have another dtype or device now
        return self


class AdaptedLinear(OverFrozen):
    """A frozen linear layer and the slots of one adapter, as parameters.

    `warmup` is a factor on the scaling; a snapshot has it folded in.
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter, *, dropout: float = 0.0, trainable: bool = True):
        super().__init__(base_layer)
        device = next(base_layer.parameters()).device
        self.slots = nn.ParameterDict(
            {name: _parameter(slot, device, trainable) for name, slot in adapter.slots().items()}
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


def attach(model: nn.Module, adapters: Mapping[str, Adapter], *, dropout: float = 0.0, trainable: bool = True) -> None:
    """Put an AdaptedLinear in the place of each named linear layer, and freeze every other parameter of the model.

    A name may lack the model's base prefix or have it in excess. Trainable slots become float32 at least; others
    keep their dtype. Raises D2SurgeryError with every misfit at once, before anything is changed: NO_SUCH_MODULE,
    TARGETS_UNMATCHED, SHAPE_MISMATCH; a checkpoint with more than linear modules (replaced weights, token rows,
    added biases) is UNATTACHABLE, 4-bit layers that have run in evaluation mode on a CPU may be REPACKED_BASE.
    """
    raise_errors(_beyond_linear(adapters))
    modules = dict(_outer_modules(model))
    places = {name_in(model, modules, name): adapter for name, adapter in adapters.items()}
    raise_errors(problem for name, adapter in places.items() for problem in _misfits(modules, name, adapter))
    _keep_unpacked(model)
    model.requires_grad_(False)
    layers = {modules[name]: adapter for name, adapter in places.items()}
    _exchange(
        model,
        {
            layer: AdaptedLinear(layer, adapter, dropout=dropout, trainable=trainable)
            for layer, adapter in layers.items()
        },
    )


def initial(
    model: nn.Module,
    kind: str,
    targets: str | Sequence[str],
    *,
    rank: int,
    scaling: float,
    generator: Generator | None = None,
    **options: Any,
) -> dict[str, Adapter]:
    """What training starts from, by module: the kind's `init` on every targeted layer, the other fields set.

    targets: name suffixes as PEFT's (a module's name, or its end after a dot), one regular expression for whole
    names, or "all-linear", which is every linear layer but the output head. options: those of the kind's `init`
    (sigma, along) and its fields (tau, along, form, detach_norm, ste). The numbers drawn depend on the generator and
    its device, not on the model's. Raises TARGETS_UNMATCHED, RANK_TOO_HIGH, BAD_CONFIG.
    """
    if kind not in KINDS:
        raise refuse("BAD_CONFIG", "No such kind.", wanted=" or ".join(KINDS), got=repr(kind))
    start, rest = _options(KINDS[kind], options)
    layers = targeted(model, targets)
    raise_errors(
        Problem(code="RANK_TOO_HIGH", message="more rank than the layer has", module=name, wanted=f"at most {most}",
                got=str(rank))
        for name, layer in layers.items() if rank > (most := min(_shape(layer)))
    )  # fmt: skip
    device = None if generator is None else generator.device
    return {
        name: replace(
            KINDS[kind].init(base_weight(layer).to(device), rank=rank, scaling=scaling, generator=generator, **start),
            **rest,
        )
        for name, layer in layers.items()
    }


def targeted(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` (see `initial`) name. Raises TARGETS_UNMATCHED with all that do not fit."""
    modules = dict(_outer_modules(model))
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    if targets == ALL_LINEAR:
        heads = _heads(model)
        return {name: module for name, module in linear.items() if module not in heads}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen: dict[str, nn.Module] = {}
    problems = [] if patterns else [Problem(code="TARGETS_UNMATCHED", message="There are no targets.")]
    for pattern in patterns:
        matched = _matched(modules, pattern, whole=isinstance(targets, str))
        problems += _wrongly_matched(pattern, matched, modules, linear)
        chosen |= {name: linear[name] for name in matched if name in linear}
    raise_errors(problems)
    return {name: module for name, module in linear.items() if name in chosen}  # in the model's order


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def detach(model: nn.Module, about: About = About()) -> Checkpoint:  # noqa: B008
    """Take the adapters out, leaving the base layers as they were (still frozen); `about` as in from_adapters."""
    checkpoint = snapshot(model, about)
    _exchange(model, {layer: layer.base_layer for layer in adapted(model).values()})
    return checkpoint


def snapshot(model: nn.Module, about: About = About()) -> Checkpoint:  # noqa: B008
    """The adapters as they are now, copied; warm-up folded into the scaling."""
    return from_adapters({name: _copied(layer.adapter) for name, layer in adapted(model).items()}, about)


def set_warmup(model: nn.Module, w: float) -> None:
    """Multiply every adapter's scaling by w: Dual LoRA starts at 0, where its delta would not be zero."""
    for layer in model.modules():
        if not isinstance(layer, OverFrozen) or (layer.warmup is None and w == 1):
            continue
        if layer.warmup is None:
            layer.warmup = torch.ones((), dtype=torch.float64, device=layer.weight.device)
        layer.warmup.fill_(w)  # the same tensor at every step: a compiled model needs no other graph


def options_of(kind: type[Adapter]) -> set[str]:
    """The options of `initial` that a kind has: of its `init`, and fields that are no slots."""
    return _of_init(kind) | {f.name for f in fields(kind)} - {*kind.dimensions, "scaling"}


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on it. MultiheadAttention reads the weight of its out_proj past its forward."""
    is_torchs = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    return is_torchs or _is(module, "transformers", "Conv1D")


def is_quantized(layer: nn.Module) -> bool:
    return _is(layer, "bitsandbytes", "Linear4bit") or _is(layer, "bitsandbytes", "Linear8bitLt")


def base_weight(layer: nn.Module) -> Weight:
    """W0 of a linear layer as (out_features, in_features), dequantised where it is quantised."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if _is(layer, "transformers", "Conv1D"):
        return weight.T
    if _is(layer, "bitsandbytes", "Linear4bit"):
        from bitsandbytes.functional import dequantize_4bit

        if _is_packed(layer):
            raise refuse("REPACKED_BASE", "the layer has run before an adapter was attached", got=f"{layer}")
        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return,attr-defined]
    if _is(layer, "bitsandbytes", "Linear8bitLt"):
        state: Any = layer.state  # holds the scales once the layer has run, its weight before
        scale: Tensor = weight.SCB if state.SCB is None else state.SCB  # type: ignore[attr-defined]
        return weight.data.float() * (scale.float() / 127)[:, None]
    return weight


def _made_again(W0: Tensor, layer: nn.Module) -> saved_tensors_hooks:
    """Keep no dequantised weight for the backward pass: the layer gives it again there."""
    address = W0.data_ptr()

    def pack(tensor: Tensor) -> Any:
        return (tensor.shape, tensor.stride()) if tensor.data_ptr() == address else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else base_weight(layer).as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)


def _keep_unpacked(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs a 4-bit layer for good when it first runs in evaluation mode. The
    scales are rounded then and no gradient passes: layers without an adapter would cut off those below them."""
    layers = {name: layer for name, layer in model.named_modules() if _is(layer, "bitsandbytes", "Linear4bit")}
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


def _is(module: nn.Module, package: str, name: str) -> bool:
    """By name: the package is imported where its layers are made, not here."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)


def _parameter(slot: Tensor, device: torch.device, trainable: bool) -> nn.Parameter:
    dtype = torch.promote_types(slot.dtype, torch.float32) if trainable else slot.dtype
    return nn.Parameter(slot.detach().to(device, dtype, copy=True), requires_grad=trainable)


def _copied(adapter: Adapter) -> Adapter:
    slots: dict[str, Any] = {name: _whole(slot.detach()).clone() for name, slot in adapter.slots().items()}
    return replace(adapter, **slots)


def _whole(slot: Tensor) -> Tensor:
    """The tensor, gathered where FSDP2 has spread it over processes: they all have to ask."""
    gather = getattr(slot, "full_tensor", None)
    return slot if gather is None else gather()


def _exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever `module` stands: a shared layer stands in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules within the model, without those inside adapted layers."""
    inner = {inside for layer in adapted(model).values() for inside in layer.modules() if inside is not layer}
    return ((name, module) for name, module in model.named_modules() if name and module not in inner)


def _heads(model: nn.Module) -> set[nn.Module]:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return {head} if head is not None else {getattr(model, name) for name in _HEADS if hasattr(model, name)}


def _matched(names: Iterable[str], pattern: str, *, whole: bool) -> list[str]:
    """PEFT's rule: one text is a regular expression for whole names, those of a list are ends of names."""
    if not whole:
        return [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    matcher = Matcher()
    try:
        return [name for name in names if matcher.fits(pattern, name)]
    except BadExpression as error:
        raise refuse("TARGETS_UNMATCHED", f"no regular expression: {error}", got=brief(pattern)) from None


def _wrongly_matched(
    pattern: str, matched: Sequence[str], modules: Mapping[str, nn.Module], linear: Mapping[str, nn.Module]
) -> Iterator[Problem]:
    if not matched:
        yield Problem(code="TARGETS_UNMATCHED", message=f"{pattern} matches nothing.", got=_near(pattern, linear))
    others = {name: type(modules[name]).__name__ for name in matched if name not in linear}
    if others:
        shown = ", ".join(f"{name} ({kind})" for name, kind in [*others.items()][:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        message = f"{pattern} matches modules that are not linear layers."
        yield Problem(code="TARGETS_UNMATCHED", message=message, wanted="linear layers", got=shown + more)


def _near(pattern: str, linear: Mapping[str, nn.Module]) -> str:
    """What there is: the last names of linear layers, nearest first."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    near = difflib.get_close_matches(pattern.rpartition(".")[2][:100], ends, n=3, cutoff=0.5)
    return ", ".join(dict.fromkeys([*near, *ends])) or "a model without linear layers"


def _of_init(kind: type[Adapter]) -> set[str]:
    return set(inspect.signature(kind.init).parameters) - {"rank", "scaling", "generator", "base_weight", "dtype"}


def _options(kind: type[Adapter], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the kind's `init`, and the fields set afterwards."""
    unknown = sorted(set(options) - options_of(kind))
    if unknown:
        wanted = ", ".join(sorted(options_of(kind))) or "none"
        raise refuse("BAD_CONFIG", f"{kind.kind} has no such option.", wanted=wanted, got=", ".join(unknown))
    return (
        {name: value for name, value in options.items() if name in _of_init(kind)},
        {name: value for name, value in options.items() if name not in _of_init(kind)},
    )


def name_in(model: nn.Module, modules: Mapping[str, Any], name: str) -> str:
    """The module's name in this model; the name itself where there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in modules), name)


def _beyond_linear(adapters: Mapping[str, Adapter]) -> Iterator[Problem]:
    """What a checkpoint holds beside adapters of linear modules, which would be lost without a word."""
    if not isinstance(adapters, Checkpoint):
        return
    layout = adapters.layout
    yield from layout.problems
    for name in (*layout.replacements, *layout.rows):
        yield Problem(code="UNATTACHABLE", message="the file replaces values of the base", module=name)
    for module, entry in layout.adapters.items():
        if entry.stored != "linear":
            yield Problem(code="UNATTACHABLE", message=f"an adapter of {entry.stored}", module=module)
        if "bias" in entry.slots:
            yield Problem(code="UNATTACHABLE", message="the file adds to the bias", module=module)


def _misfits(modules: Mapping[str, nn.Module], name: str, adapter: Adapter) -> Iterator[Problem]:
    module, got = modules.get(name), (adapter.out_features, adapter.in_features)
    if module is None:
        linear = {name: module for name, module in modules.items() if is_linear(module)}
        yield Problem(code="NO_SUCH_MODULE", message="not in this model", module=name, wanted=_near(name, linear))
    elif not is_linear(module):
        yield Problem(code="TARGETS_UNMATCHED", message="not a linear layer", module=name, got=type(module).__name__)
    elif got != _shape(module):
        message = "the adapter is for another size"
        yield Problem(code="SHAPE_MISMATCH", message=message, module=name, wanted=f"{_shape(module)}", got=f"{got}")


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), also where the weight is packed."""
    return (layer.nf, layer.nx) if _is(layer, "transformers", "Conv1D") else (layer.out_features, layer.in_features)  # type: ignore[return-value]
