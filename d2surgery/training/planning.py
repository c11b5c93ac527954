"""What a training will be, known before its first step: rows, steps, tokens, and what is trained."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import Tensor

from d2surgery.errors import Problem, refuse
from d2surgery.kinds import TABLE
from d2surgery.live.attaching import adapted
from d2surgery.live.layers import AdaptedLinear
from d2surgery.live.quantization import Quantization, entries, quantization_in
from d2surgery.training.data import Corpus, Row, rows, tokens_of
from d2surgery.training.settings import TrainConfig

FAR = 0.02
"""Of the base weights: how far a random start may move them without a word."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What will be trained, known before the first step."""

    kind: str
    modules: int
    targets: Mapping[str, tuple[str, ...]]  # "model.layers.*.mlp" -> last names of its adapted modules
    ranks: tuple[int, ...]
    scaling: float
    effective_scaling: float  # W' − W0 is so many times B·A to first order: twice the scaling of D2-LoRA
    trainable_parameters: int
    all_parameters: int
    quantization: Quantization | None  # of the base in memory
    items: int
    held_out: int
    rows: int
    steps: int
    rows_per_step: int
    tokens: int
    resumed_from: int | None
    problems: tuple[Problem, ...]  # warnings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rows of the run, and what happens when."""

    rows: list[Row]
    rows_per_step: int
    steps: int
    tokens: list[int]  # in the first n steps, n from 0
    epochs: float
    scaling_warmup: int

    def every(self, chosen: int | None) -> int:
        return chosen or ceil(self.steps / 10)


def schedule_of(config: TrainConfig, corpus: Corpus) -> Schedule:
    optimizer = config.optimizer
    per_step = optimizer.batch * optimizer.accumulation * world()
    chosen = rows(
        corpus.train,
        batching=config.data.batching,
        max_length=config.data.max_length,
        batch=per_step,
        seed=config.run.seed,
        **({"count": optimizer.steps * per_step} if optimizer.steps else {"epochs": optimizer.epochs}),
    )
    steps = ceil(len(chosen) / per_step)
    each = [tokens_of(corpus.train, chosen[at * per_step : (at + 1) * per_step]) for at in range(steps)]
    warmup = config.adapter.scaling_warmup
    if config.adapter.kind == "duallora" and warmup is None:
        warmup = ceil(steps / 10)
    if (warmup or 0) > steps:
        raise refuse("BAD_CONFIG", "the scaling would not have finished rising", module="adapter.scaling_warmup",
                     wanted=f"at most {steps}", got=str(warmup))  # fmt: skip
    return Schedule(
        rows=chosen,
        rows_per_step=per_step,
        steps=steps,
        tokens=[0, *accumulate(each)],
        epochs=sum(map(len, chosen)) / len(corpus.train),
        scaling_warmup=warmup or 0,
    )


def plan_of(config: TrainConfig, model: Any, corpus: Corpus, schedule: Schedule, resumed_from: int | None) -> TrainPlan:
    layers = adapted(model)
    groups = len(TABLE[config.adapter.kind].groups)
    return TrainPlan(
        kind=config.adapter.kind,
        modules=len(layers),
        targets=_by_parent(layers),
        ranks=(config.group_rank,) * groups,
        scaling=config.scaling,
        effective_scaling=config.scaling * next(iter(layers.values())).adapter.first_order,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=sum(map(entries, model.parameters())),
        quantization=quantization_in(model),
        items=len(corpus.train),
        held_out=len(corpus.held_out),
        rows=len(schedule.rows),
        steps=schedule.steps,
        rows_per_step=schedule.rows_per_step,
        tokens=schedule.tokens[-1],
        resumed_from=resumed_from,
        problems=(*_too_long(config, corpus), *_idle(config), *_moved(layers)),
    )


def _by_parent(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Last names by what stands before them, numbers as *: where targets matched more than was meant, it shows."""
    found: dict[str, dict[str, None]] = {}
    for module in modules:
        parent, _, name = re.sub(r"(?<![^.])\d+(?![^.])", "*", module).rpartition(".")
        found.setdefault(parent, {})[name] = None
    return {parent: tuple(names) for parent, names in found.items()}


def _too_long(config: TrainConfig, corpus: Corpus) -> Iterator[Problem]:
    """What max_length cost."""
    most = config.data.max_length
    if corpus.prompts_cut:
        message = f"{corpus.prompts_cut} questions lost their beginning to fit {most} tokens with their answers"
        yield Problem(code="ITEMS_TOO_LONG", message=message, severity="warning")
    if corpus.left_out:
        few, more = "; ".join(corpus.left_out[:8]), len(corpus.left_out) - 8
        message = f"left out, since {most} tokens are too few for them even without their question: {few}"
        message += f" and {more} more" if more > 0 else ""
        yield Problem(code="ITEMS_TOO_LONG", message=message, severity="warning")


def _idle(config: TrainConfig) -> Iterator[Problem]:
    """Devices that one process leaves alone."""
    more = torch.accelerator.device_count() - 1
    if world() == 1 and config.run.device != "cpu" and more > 0:
        message = f"one process trains on one device, and {more} more {'is' if more == 1 else 'are'} idle"
        line = f"torchrun --nproc-per-node {more + 1} -m d2surgery train …"
        yield Problem(code="IDLE_DEVICES", message=message, severity="warning", wanted=line)


@torch.no_grad()
def _moved(layers: Mapping[str, AdaptedLinear]) -> Iterator[Problem]:
    """How far Dual LoRA's random start moves the weights once its scaling has risen, where that is far: per module
    s·rms(B)·rms(A)·√(r/2) over rms(W0), which is ‖s·ReLU(B·A)‖/‖W0‖ of independent normal factors."""
    shares: dict[str, float] = {}
    for name, layer in layers.items():
        if layer.adapter.kind != "duallora" or layer.weight.is_meta:
            continue
        slots, scaling = layer.adapter.slots(), abs(float(layer.adapter.scaling))
        size = scaling * _rms(slots["B"]) * _rms(slots["A"]) * (len(slots["A"]) / 2) ** 0.5
        base = _rms(layer.base_weight)
        shares[name] = size / base if base else 0.0
    if shares and median(shares.values()) > FAR:
        worst = max(shares, key=lambda name: shares[name])
        message = f"at full scaling the random start moves the weights by {100 * median(shares.values()):.1f} %"
        got = f"{100 * shares[worst]:.1f} % in {worst}"
        yield Problem(code="START_MOVES_BASE", message=message, severity="warning", wanted="a smaller sigma", got=got)


def _rms(matrix: Tensor) -> float:
    return float(matrix.float().square().mean().sqrt())


def first_on_host() -> bool:
    """Whether this process is the first one of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world() -> int:
    """The processes that share a step, as torchrun and accelerate launch say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
