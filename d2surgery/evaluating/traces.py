"""What every module of a running model puts out, and how far that lies from another model's.

Each output is taken twice: in the model's own course, where a module also passes on the errors before it, and alone,
where it is given the reference's input. That tells the module that differs from those that only follow it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2surgery.errors import refuse
from d2surgery.live.layers import AdaptedLinear, is_linear

POSITIONS = 8  # of each prompt, the last ones, that are compared


@dataclass(frozen=True, kw_only=True)
class Layer:
    """‖y − y_reference‖/‖y_reference‖ of a module's output; inf where shapes differ or a number is not finite.

    own_…: of the module alone, given the reference's input; None where it looks at several positions or inputs.
    """

    module: str
    error: float  # of the merged model
    noise: float  # of a right merge
    served: float  # of the live model in the merged dtype
    effect: float | None  # of the base: what the adapter does here
    own_error: float | None
    own_noise: float | None
    own_effect: float | None

    @property
    def excess(self) -> float:
        """How many times what a right merge errs."""
        return self.error / self.noise

    @property
    def own_excess(self) -> float:
        """The same of the module alone; 0 where that is not known."""
        return self.own_error / self.own_noise if self.own_error is not None and self.own_noise is not None else 0.0


@dataclass
class Trace:
    """One forward of one model; outputs and inputs at the last positions, by module, calls one after the other."""

    logits: Float[Tensor, "positions vocabulary"] | None
    outputs: dict[str, Tensor]
    own: dict[str, Tensor]  # what the modules put out when given the reference's inputs
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # kept by the reference only


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, reference: Trace | None = None) -> Trace:
    """Run a model on one row of tokens and keep what its modules put out; without `reference`, it is the reference.

    Raises D2SurgeryError NOT_RUNNABLE.
    """
    outputs: dict[str, list[Tensor]] = {}
    own: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor) or not first.is_floating_point() or first.dim() < 2:
                return
            call = len(outputs.setdefault(name, []))
            outputs[name].append(_last(first).cpu())
            if reference is None and _is_pointwise(module, given):
                inputs.setdefault(name, []).append(_last(given[0]))
            elif reference is not None and call < len(reference.inputs.get(name, ())):
                same = reference.inputs[name][call].to(ids.device)
                same = same.to(given[0].dtype) if same.is_floating_point() else same
                own.setdefault(name, []).append(module.forward(same).cpu())

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in _watched(model)]
    try:
        output = run(model, ids)
    finally:
        for handle in hooks:
            handle.remove()
    logits = getattr(output, "logits", None)
    has_logits = isinstance(logits, Tensor) and logits.shape[-1] > 1  # one number is a regression
    return Trace(
        logits=_rows(logits).cpu() if has_logits and logits is not None else None,
        outputs={name: torch.cat(parts) for name, parts in outputs.items()},
        own={name: torch.cat(parts) for name, parts in own.items()},
        inputs=inputs,
    )


class LayerSums:
    """Squared errors of every module's output against the reference's, added up over prompts."""

    def __init__(self, reference: Sequence[Trace]) -> None:
        self.reference = reference
        self.squares: dict[tuple[str, str], float] = {}  # (model, module), "own " before the model's name
        self.norms: dict[str, float] = {}
        for run in reference:
            for name, output in run.outputs.items():
                self.norms[name] = self.norms.get(name, 0.0) + float(output.double().square().sum())
        self.pointwise = {name for run in reference for name in run.inputs}

    def add(self, model: str, prompt: int, run: Trace) -> Tensor:
        """Count a run of "base", "served", "right" or "merged"; gives its logits back."""
        for name, wanted in self.reference[prompt].outputs.items():
            self._count((model, name), wanted, run.outputs.get(name))
            if name in self.pointwise:
                self._count((f"own {model}", name), wanted, run.own.get(name))
        return run.logits if run.logits is not None else torch.empty(0, 0)

    def records(self, wide: torch.dtype) -> tuple[Layer, ...]:
        """In the order in which the modules first ran; `wide` is the dtype that was computed in.

        The noise is never less than a few roundings of that dtype. Libraries add up float32 products in different
        orders, and so merge into float32 differently: there (wide is float64) the noise of serving counts too.
        """
        least = 16 * torch.finfo(wide).eps

        def noise(own: str, name: str) -> float:
            served = self._relative(f"{own}served", name) if wide == torch.float64 else None
            return max(self._relative(f"{own}right", name) or 0.0, served or 0.0, least)

        return tuple(
            Layer(
                module=name,
                error=self._relative("merged", name) or 0.0,
                noise=noise("", name),
                served=self._relative("served", name) or 0.0,
                effect=self._relative("base", name),
                own_error=self._relative("own merged", name),
                own_noise=noise("own ", name) if name in self.pointwise else None,
                own_effect=self._relative("own base", name),
            )
            for name in self.norms
        )

    def _count(self, key: tuple[str, str], wanted: Tensor, found: Tensor | None) -> None:
        square = inf
        if found is not None and found.shape == wanted.shape:
            square = float((found.double() - wanted.double()).square().sum())
        self.squares[key] = self.squares.get(key, 0.0) + (square if isfinite(square) else inf)

    def _relative(self, model: str, name: str) -> float | None:
        square = self.squares.get((model, name))
        if square is None:
            return None
        return sqrt(square / self.norms[name]) if self.norms[name] else (inf if square else 0.0)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _last(values: Tensor) -> Tensor:
    """The last positions: of vectors, rows; of token ids, ids."""
    return (_rows(values) if values.is_floating_point() else values.reshape(-1))[-POSITIONS:]


def _is_pointwise(module: nn.Module, given: tuple[Any, ...]) -> bool:
    """Whether its output at a position is a function of its one input there: linear layers, norms, embeddings."""
    if len(given) != 1 or not isinstance(given[0], Tensor):
        return False
    if isinstance(module, nn.Embedding):
        return not given[0].is_floating_point() and not _has_own_forward(module)
    return isinstance(module, AdaptedLinear) or is_linear(module) or type(module).__name__.endswith("Norm")


def _has_own_forward(embedding: nn.Embedding) -> bool:
    """Position embeddings count positions; a scaled one calls the plain one."""
    return type(embedding).forward is not nn.Embedding.forward and "Scaled" not in type(embedding).__name__


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with parameters of its own; an adapted layer as the one layer that it stands for."""
    inner = {
        part for module in model.modules() if isinstance(module, AdaptedLinear) for part in module.modules()
        if part is not module
    }  # fmt: skip
    for name, module in model.named_modules():
        if module not in inner and (isinstance(module, AdaptedLinear) or module._parameters):
            yield name, module


def run(model: Any, ids: Tensor) -> Any:
    """What a model makes of token ids. Raises D2SurgeryError NOT_RUNNABLE."""
    arguments = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    try:
        return model(**arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise refuse("NOT_RUNNABLE", f"{type(model).__name__} does not run: {reason}") from None
