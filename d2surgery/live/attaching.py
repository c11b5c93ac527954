"""Adapters live in a torch model: `attach` puts an AdaptedLinear in the place of each linear layer, `detach` ends it.

The base is frozen; slots are trained in float32 at least, and autocast decides what is computed lower.
"""

import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from d2surgery.adapters import KINDS, Adapter
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import Problem, brief, raise_errors, refuse
from d2surgery.formats.layout import About
from d2surgery.formats.patterns import BadExpression, Matcher
from d2surgery.live.layers import AdaptedLinear, OverFrozen, base_weight, is_linear, keep_unpacked, shape_of

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # of transformers' classifiers, which have no output embeddings


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
    keep_unpacked(model)
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
    (sigma, along) and its fields (tau, along, form, detach_norm, detach_minus, ste). The numbers drawn depend on the
    generator and its device, not on the model's. Raises TARGETS_UNMATCHED, RANK_TOO_HIGH, BAD_CONFIG.
    """
    if kind not in KINDS:
        raise refuse("BAD_CONFIG", "No such kind.", wanted=" or ".join(KINDS), got=repr(kind))
    start, rest = _options(KINDS[kind], options)
    layers = targeted(model, targets)
    raise_errors(
        Problem(code="RANK_TOO_HIGH", message="more rank than the layer has", module=name, wanted=f"at most {most}",
                got=str(rank))
        for name, layer in layers.items() if rank > (most := min(shape_of(layer)))
    )  # fmt: skip
    device = None if generator is None else generator.device
    found = {}
    for name, layer in layers.items():
        W0 = base_weight(layer)
        if W0.is_meta:
            adapter = _without_numbers(KINDS[kind].init(W0, rank=rank, scaling=scaling, **start))
        else:
            adapter = KINDS[kind].init(W0.to(device), rank=rank, scaling=scaling, generator=generator, **start)
        found[name] = replace(adapter, **rest)
    return found


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
    """The adapters as they are now, copied, and what is trained whole beside them. Warm-up is folded into the scaling,
    and `warmup` is among what is said of the training where it is not over."""
    layers = adapted(model)
    factors = {float(layer.warmup) for layer in layers.values() if layer.warmup is not None} - {1.0}
    if len(factors) == 1:
        about = replace(about, training={**about.training, "warmup": factors.pop()})
    whole = {name: _whole(parameter.detach()).clone() for name, parameter in trained_whole(model).items()}
    return from_adapters(
        {name: _copied(layer.adapter) for name, layer in layers.items()}, about, replacements=whole or None
    )


def train_whole(model: nn.Module, names: Collection[str] = ()) -> None:
    """Train a classifier's head whole, in float32, beside the adapters, and other tensors of these names."""
    of_heads = {parameter for head in _tops(model) for parameter in head.parameters()}
    for name, parameter in list(model.named_parameters()):
        if name in names or parameter in of_heads:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(_on_host(parameter.detach()).float()))


def trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained beside the slots of adapters, by name."""
    slots = {id(slot) for layer in adapted(model).values() for slot in layer.slots.values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in slots}


def set_warmup(model: nn.Module, w: float) -> None:
    """Multiply every adapter's scaling by w: Dual LoRA starts at 0, where its delta would not be zero."""
    for layer in model.modules():
        if isinstance(layer, OverFrozen):
            layer.warm(w)


def options_of(kind: type[Adapter]) -> set[str]:
    """The options of `initial` that a kind has: of its `init`, and fields that are no slots."""
    return _of_init(kind) | {f.name for f in fields(kind)} - {*kind.dimensions, "scaling"}


def _without_numbers(adapter: Adapter) -> Adapter:
    """Zeros in the place of what is on meta."""
    slots: dict[str, Any] = {name: _on_host(slot) for name, slot in adapter.slots().items()}
    return replace(adapter, **slots)


def _on_host(tensor: Tensor) -> Tensor:
    """Zeros for what has no numbers: in FSDP's other processes, which the first one sends them. On the CPU, since
    accelerate knows parameters by where they lie."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


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
    return {head} if head is not None else {part for top in _tops(model) for part in top.modules()}


def _tops(model: nn.Module) -> list[nn.Module]:
    return [getattr(model, name) for name in _HEADS if hasattr(model, name)]


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
    elif got != shape_of(module):
        message = "the adapter is for another size"
        yield Problem(code="SHAPE_MISMATCH", message=message, module=name, wanted=f"{shape_of(module)}", got=f"{got}")
