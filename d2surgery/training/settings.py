"""What a training run is, as values: a section of the file is a dataclass here, a key one of its fields."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from d2surgery.evaluating.items import Template
from d2surgery.kinds import TABLE, Axis, Form, Straight
from d2surgery.live.quantization import Quantization

Goal = Literal["answers", "labels"]
Batching = Literal["shuffled", "by_length", "packed"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class Range(NamedTuple):
    """What numbers a field takes, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("more than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
SHARE = Range("0 or more, less than 1", lambda value: 0 <= value < 1)


class Hint(NamedTuple):
    """What a setting is. `numbers` says whether it changes what is learnt: a run is resumed with the same of those."""

    help: str
    within: Range | None = None
    numbers: bool = True
    among: tuple[str, ...] = ()  # the words it may be, where its type does not say them


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter that is trained."""

    kind: Annotated[str, Hint("What is trained.", among=tuple(sorted(TABLE, key=lambda kind: len(TABLE[kind].slots))))]
    targets: Annotated[tuple[str, ...], Hint("Names of layers or their ends; all-linear is all but the head.")] = (
        "all-linear",
    )
    rank: Annotated[int, Hint("Rank.", POSITIVE)] = 8
    matched: Annotated[
        bool, Hint("Rank counts parameters as LoRA's do: the two groups of Dual LoRA and D2-LoRA get half of it each.")
    ] = True
    alpha: Annotated[float | None, Hint("The scaling is alpha/r, r of one group; default 2r.", POSITIVE)] = None
    rslora: Annotated[bool, Hint("The scaling is alpha/√r (LoRA and DoRA).")] = False
    dropout: Annotated[float, Hint("On the input of the update.", SHARE)] = 0.0
    tau: Annotated[float | None, Hint("D2-LoRA: weight of the minus branch.")] = None
    along: Annotated[Axis | None, Hint("The axis whose norms are kept: D2-LoRA.")] = None
    form: Annotated[Form | None, Hint("D2-LoRA: W* + ΔW, W* alone or W0 + ΔW.")] = None
    detach_norm: Annotated[bool | None, Hint("D2-LoRA: the norm is a constant to the gradient.")] = None
    detach_minus: Annotated[
        bool | None, Hint("D2-LoRA: the minus branch is a constant to the gradient, and stays as it starts: nothing.")
    ] = None
    sigma: Annotated[
        float | None,
        Hint("Standard deviation of the start: D2-LoRA's A₋ 0.02; Dual LoRA by the base, moving it by 1 %.", POSITIVE),
    ] = None
    ste: Annotated[
        Straight | None,
        Hint("Dual LoRA: the gradient through the sign; `clipped` in metrics.jsonl is what it changed."),
    ] = None
    scaling_warmup: Annotated[
        int | None, Hint("Dual LoRA: steps over which the scaling rises from 0; default a tenth of all.", NOT_NEGATIVE)
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Questions with answers; the loss is on the answers."""

    train: Annotated[
        tuple[str, ...],
        Hint("Items: files of JSON or JSON lines, .parquet or .csv, hub datasets org/name[:config][:split]."),
    ]
    limit: Annotated[int, Hint("At most so many items of each file, drawn under the seed.", POSITIVE)] = 5000
    held_out: Annotated[
        tuple[str, ...], Hint("Held-out items, likewise. None: some of each training file's are kept aside.")
    ] = ()
    held_out_limit: Annotated[
        int, Hint("At most so many held-out items of each file; 0: no evaluation.", NOT_NEGATIVE)
    ] = 100
    goal: Annotated[
        Goal, Hint("The answers' words; or labels: which of the choices that all items share, by a head trained whole.")
    ] = "answers"
    template: Annotated[Template, Hint("How a question is put; auto: the model's chat template where it has one.")] = (
        "auto"
    )
    max_length: Annotated[
        int, Hint("Tokens of a row. A longer item loses the beginning of its question, not the template's.", POSITIVE)
    ] = 512
    batching: Annotated[
        Batching,
        Hint("One item per row, in any order or near others of its length; or rows packed with several items."),
    ] = "shuffled"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and how long."""

    epochs: Annotated[float, Hint("Times that the training items are seen.", POSITIVE)] = 2.0
    steps: Annotated[int | None, Hint("Steps instead of epochs.", POSITIVE)] = None
    batch: Annotated[int, Hint("Rows per device and forward.", POSITIVE)] = 8
    accumulation: Annotated[int, Hint("Forwards per step.", POSITIVE)] = 1
    lr: Annotated[float, Hint("Learning rate.", POSITIVE)] = 2e-4
    lr_ratio: Annotated[
        dict[str, float], Hint("Learning rate of a slot as a multiple of lr: B = 16 is LoRA+.", POSITIVE)
    ] = field(default_factory=dict)
    schedule: Annotated[Schedule, Hint("How the learning rate falls.")] = "linear"
    warmup: Annotated[float, Hint("Share of the steps over which the learning rate rises.", SHARE)] = 0.03
    weight_decay: Annotated[
        float, Hint("On every slot but magnitudes, whose natural value is not 0.", NOT_NEGATIVE)
    ] = 0.0
    max_grad_norm: Annotated[float, Hint("The gradient is scaled down to this norm; 0: never.", NOT_NEGATIVE)] = 1.0


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The machine, and what is written when."""

    seed: Annotated[int, Hint("Of initial values, items drawn, their order, dropout.", NOT_NEGATIVE)] = 0
    precision: Annotated[Precision, Hint("Of the frozen base and of the forward; slots stay in float32.")] = "fp32"
    quantization: Annotated[
        Quantization | None, Hint("Hold the frozen base in 4 (NF4, as QLoRA) or 8 bit: extra quantized.")
    ] = None
    device: Annotated[
        Literal["auto", "cpu"], Hint("auto: the accelerator, where there is one with float64; Apple's MPS has none.")
    ] = "auto"
    attention: Annotated[
        Attention | None, Hint("How attention is computed: transformers' own choice, or one of these.")
    ] = None
    gradient_checkpointing: Annotated[bool, Hint("Forget activations and compute them again: less memory, slower.")] = (
        False
    )
    compile: Annotated[bool, Hint("torch.compile the model.")] = False
    log_every: Annotated[int, Hint("Steps between lines of metrics.jsonl.", POSITIVE)] = 10
    eval_every: Annotated[
        int | None, Hint("Steps between evaluations on held-out items; default a tenth of all.", POSITIVE)
    ] = None
    patience: Annotated[
        int | None,
        Hint("Evaluations without a lower held-out loss after which training stops; default: none.", POSITIVE),
    ] = None
    best: Annotated[bool, Hint("Keep the adapter of the lowest held-out loss, not the last one.")] = False
    save_every: Annotated[
        int | None, Hint("Steps between checkpoints; default a tenth of all.", POSITIVE, numbers=False)
    ] = None
    keep: Annotated[int, Hint("Checkpoints kept.", POSITIVE, numbers=False)] = 2
    report_to: Annotated[tuple[str, ...], Hint("tensorboard, wandb …: where Trainer reports to.", numbers=False)] = ()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    base: Annotated[str, Hint("Model directory or hub id.")]
    output: Annotated[str, Hint("Directory for the adapter, its checkpoints and metrics.jsonl.", numbers=False)]
    adapter: AdapterSettings
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()

    @property
    def group_rank(self) -> int:
        """The rank of one pair of factors."""
        two = len(TABLE[self.adapter.kind].groups) > 1 and self.adapter.matched
        return self.adapter.rank // 2 if two else self.adapter.rank

    @property
    def alpha(self) -> float:
        return 2.0 * self.group_rank if self.adapter.alpha is None else self.adapter.alpha

    @property
    def scaling(self) -> float:
        """α/r; Dual LoRA α/√(r1·r2), which is the same for equal ranks; rsLoRA α/√r."""
        return self.alpha / (math.sqrt(self.group_rank) if self.adapter.rslora else self.group_rank)

    @property
    def kind_options(self) -> dict[str, Any]:
        """What was chosen of the kind's own options."""
        chosen = {name: getattr(self.adapter, name) for name in KIND_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}


KIND_OPTIONS = ("tau", "along", "form", "detach_norm", "detach_minus", "sigma", "ste")
