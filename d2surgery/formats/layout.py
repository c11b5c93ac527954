"""Layout: every tensor of an adapter file in exactly one place, from names and shapes only.

A slot of an adapter, a replacement of a base tensor, replaced rows of one, `superseded` by a better copy, or `unread`:
a problem names the last two.
Nothing here reads tensor data or imports torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from d2surgery.errors import Problem, refuse
from d2surgery.files.header import Header
from d2surgery.kinds import TABLE

if TYPE_CHECKING:  # describing a file needs none
    from torch import Tensor

Stored = Literal["linear", "embedding", "conv", "experts"]
Packing = Literal["interleaved", "grouped"]
"""Where column j of expert e's B lies in lora_B (out, r·E): column j·E + e, as in PEFT, or e·r + j."""


class Reading(TypedDict, total=False):
    """What is said from outside of an adapter's file that does not say it itself: keywords of all that opens one."""

    expert_layout: Packing | None  # how experts share the columns of lora_B; None: as the file says, or as PEFT does
    scale: float | None  # what multiplies B·A
    alpha: float | None  # the same, times the rank


class Slot(NamedTuple):
    """Where a slot's matrix lies: in the tensor under `key`, or in some rows of it; `transposed` as its transpose.

    Where it is stored in no tensor as it is, `made` makes it of the tensors under `key` and `also`: rows in another
    order, the product of further factors.
    """

    key: str
    transposed: bool = False
    rows: tuple[int, int] | None = None  # of the tensor as stored
    also: tuple[str, ...] = ()
    made: "Callable[..., Tensor] | None" = None


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """What was learnt for one module: which tensors fill which slots, and what else decides the values.

    `module` is the dotted name in the base model without `.weight`; for an expert parameter, the parameter's name.
    Shapes are those of the (out_features, in_features) update; a conv's kernel is flattened into in_features.
    """

    module: str
    kind: str
    stored: Stored
    slots: Mapping[str, Slot]  # "bias" is lora_bias's addition to the bias
    ranks: Mapping[str, int]  # group -> rank; per expert for experts
    out_features: int
    in_features: int
    dtype: str
    scaling: float | None  # None: unknown, the numbers are known up to scale
    settings: Mapping[str, Any] = field(default_factory=dict)  # the kind's own, those of training too
    kernel: tuple[int, ...] = ()  # of a convolution: in_channels and the kernel's shape
    experts: int = 1
    blocked: tuple[str, ...] = ("A",)  # slots whose ranks lie expert by expert; the others' lie rank by rank
    as_declared: bool = False  # of experts: out_features are the parameter's second axis, whatever the model
    divisor: int | None = None  # what divides alpha, where it is not the rank: that of one of several products
    numbers: tuple[str, ...] = ()  # keys of what else decides the values: an alpha, further factors of a slot
    misread: Mapping[str, float] = field(default_factory=dict)  # in words -> what careless readers take for the scaling

    @property
    def rank(self) -> int | None:
        """The bound on the rank of the update: r; 2r for D2-LoRA; None for Dual LoRA, whose update has no bound."""
        return sum(self.ranks.values()) if TABLE[self.kind].bounded else None

    @property
    def axis(self) -> str | None:
        """The axis whose vectors it rescales by what the whole vector holds."""
        return TABLE[self.kind].axis(self.settings)

    @property
    def packed(self) -> Packing:
        """Whether every expert's ranks lie together in both factors, or in one only, as PEFT has them."""
        return "grouped" if len(self.blocked) == 2 else "interleaved"

    def with_packing(self, packed: Packing) -> "AdapterLayout":
        """The same factors, shared by the experts in another way."""
        peft: tuple[str, ...] = ("B",) if self.as_declared else ("A",)
        return replace(self, blocked=("A", "B") if packed == "grouped" else peft)

    @property
    def keys(self) -> dict[str, str]:
        """Slot -> key."""
        return {name: slot.key for name, slot in self.slots.items()}


class Rows(NamedTuple):
    """Trained token rows: row `indices[i]` of the base tensor becomes row i of the tensor under `key`."""

    key: str
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """What an adapter says of itself beside its tensors, in no format's words."""

    base_model: str | None = None  # name or path of the base it was trained on
    task: str | None = None  # CAUSAL_LM, SEQ_CLS, TOKEN_CLS …: what the model around it is for
    model_class: str | None = None  # transformers' class that it was trained in
    tied: bool = False  # the two sides of a tie were trained as one, so they hold the same numbers
    transposed: bool = False  # its writer took base weights to lie (in, out)
    saved_modules: tuple[str, ...] = ()  # trained whole: see `saves`
    version: str | None = None  # of what wrote it
    alpha: float | None = field(default=None, compare=False)  # as its config has it, for modules that no pattern names
    dropout: float | None = field(default=None, compare=False)
    model: Mapping[str, Any] = field(default_factory=dict, compare=False)  # its base's config, where that is at hand
    training: Mapping[str, Any] = field(default_factory=dict)  # how it was trained, for the record
    settings: Mapping[str, Any] = field(default_factory=dict)  # the format's own, read by that format's module alone
    history: tuple[Mapping[str, Any], ...] = field(
        default=(), compare=False
    )  # what surgery made it, the last step last

    targets: Callable[[str], bool | None] = field(default=lambda module: None, compare=False, repr=False)
    """Whether it asks for factors on a module, by its name; None where it names none."""

    def saves(self, tensor: str) -> bool:
        """Whether saved_modules name the module of a tensor, or one that holds it: it then has a copy of its own."""
        return lies_within(self.saved_modules, tensor)


@dataclass(frozen=True, kw_only=True, repr=False)
class Layout:
    """An adapter by names and shapes. `format` is "" for one that was not read from a file."""

    path: Path
    format: str
    header: Header
    rule: str = ""  # why it is of this format
    about: About = About()  # a frozen value
    adapters: Mapping[str, AdapterLayout] = field(default_factory=dict)  # by module
    replacements: Mapping[str, str] = field(default_factory=dict)  # base tensor name -> key
    rows: Mapping[str, Rows] = field(default_factory=dict)  # base tensor name -> rows
    superseded: tuple[str, ...] = ()  # copies of what another key holds as it was trained
    unread: tuple[str, ...] = ()  # keys that a problem explains
    problems: tuple[Problem, ...] = ()

    def __repr__(self) -> str:
        what = " and ".join(TABLE[kind].title for kind in self.kinds) or "no adapter"
        where = self.format or "in memory"
        return f"Layout({what} on {len(self.adapters)} modules, {where}, {len(self.problems)} problems)"

    @property
    def kinds(self) -> list[str]:
        return sorted({adapter.kind for adapter in self.adapters.values()})

    @property
    def base_model(self) -> str | None:
        return self.about.base_model

    def accounted(self) -> Iterator[str]:
        """The keys that have a place other than `unread`, each once."""
        every = self.adapters.values()
        yield from dict.fromkeys(key for a in every for key in (*a.keys.values(), *a.numbers))
        yield from self.replacements.values()
        yield from (rows.key for rows in self.rows.values())
        yield from self.superseded


def lies_within(ends: Iterable[str], tensor: str) -> bool:
    """Whether a tensor lies in a module whose name ends so. PEFT's rule for modules_to_save: the end may begin inside
    a word, `classifier` is an end of `pre_classifier`."""
    parts = tensor.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(holder.endswith(end) for end in ends for holder in holders)


def lies_transposed(pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether the shapes of pairs fit as (in, r) and (r, out), and one of them not as (r, in) and (out, r).

    Nor does a rank above both sides fit, where the other reading gives a smaller one.
    """
    found = list(pairs)
    matrices = all(len(down) == len(up) == 2 and down[1] == up[0] for down, up in found)
    return matrices and any(down[0] != up[1] or down[0] > max(down[1], up[0]) for down, up in found)


def with_expert_layout(layout: Layout, packed: Packing) -> Layout:
    """The layout with every expert's B read so, whatever the file says: nothing is assumed any more."""
    entries = {
        module: entry.with_packing(packed) if entry.experts > 1 else entry for module, entry in layout.adapters.items()
    }
    problems = tuple(problem for problem in layout.problems if problem.code != "EXPERT_LAYOUT_ASSUMED")
    return replace(layout, adapters=entries, problems=problems)


def with_scaling(layout: Layout, scale: float | None, alpha: float | None) -> Layout:
    """The layout with the scaling that its file does not carry: `scale`, or alpha/r. Raises USAGE where it does."""
    unknown = {module: entry for module, entry in layout.adapters.items() if entry.scaling is None}
    if not unknown or (scale is None) == (alpha is None):
        got = "both" if unknown else "the file has its own scaling"
        raise refuse("USAGE", "a scale or an alpha is for a file that has none", file=str(layout.path), got=got)
    known = {
        module: replace(
            entry, scaling=scale if alpha is None else alpha / (entry.divisor or alpha_divisor(entry.ranks))
        )
        for module, entry in unknown.items()
    }
    problems = tuple(p for p in layout.problems if p.code not in ("MISSING_CONFIG", "SCALING_UNKNOWN"))
    return replace(layout, adapters={**layout.adapters, **known}, problems=problems)


def alpha_divisor(ranks: Mapping[str, int]) -> float:
    """scaling = alpha/r; with several groups r is the geometric mean of theirs: √(r1·r2) for Dual LoRA."""
    first, *others = ranks.values()
    if all(rank == first for rank in others):
        return float(first)
    return sqrt(prod(ranks.values())) if len(ranks) == 2 else prod(ranks.values()) ** (1 / len(ranks))
