"""The kinds of adapter, a row each: what their tensors and settings are called. The formulas stand in `adapters`.

No torch: a file is described by names and shapes before a number of it is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

Settings = Mapping[str, Any]
Axis = Literal["out_features", "in_features"]
"""The axis that is kept: "out_features" is one number per row of (out_features, in_features)."""
Straight = Literal["clip", "mask", "identity"]
"""Of Dual LoRA: the gradient through the sign."""
Form = Literal["projected_plus_update", "projected", "update"]
"""Of D2-LoRA: W* + ΔW, W* or W0 + ΔW."""


class Group(NamedTuple):
    """Two factors whose product is a part of the update: down (rank, in_features) and up (out_features, rank)."""

    down: str
    up: str
    rank: str = "r"  # the setting that holds its rank


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Kind:
    """What sets a kind apart from LoRA, in names."""

    title: str  # as people write it
    groups: Mapping[str, Group]
    vectors: tuple[str, ...] = ()  # slots that hold one number per vector
    settings: Settings = field(default_factory=dict)  # what else decides its values -> the default
    training: tuple[str, ...] = ()  # settings that decide no value, only the gradient
    linear_only: bool = False
    bounded: bool = True  # the ranks of its groups, summed, bound the rank of its update
    axis: Callable[[Settings], str | None] = lambda settings: None
    """The axis whose vectors it rescales by what the whole vector holds; None where each entry stands for itself."""

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Every slot that it has, in the order in which they are written."""
        return (*(slot for group in self.groups.values() for slot in (group.down, group.up)), *self.vectors)


TABLE: dict[str, Kind] = {  # in the order of detection
    "duallora": Kind(
        title="Dual LoRA",
        groups={"magnitude": Group("A", "B", "r1"), "direction": Group("C", "D", "r2")},
        training=("ste",),
        linear_only=True,
        bounded=False,
    ),
    "d2lora": Kind(
        title="D2-LoRA",
        groups={"plus": Group("A_plus", "B_plus"), "minus": Group("A_minus", "B_minus")},
        settings={"tau": 0.5, "along": "in_features", "form": "projected_plus_update"},
        training=("detach_norm", "detach_minus"),
        linear_only=True,
        axis=lambda settings: None if settings["form"] == "update" else settings["along"],
    ),
    "dora": Kind(
        title="DoRA",
        groups={"update": Group("A", "B")},
        vectors=("magnitude",),
        settings={"along": "out_features"},
        axis=lambda settings: settings["along"],
    ),
    "lora": Kind(title="LoRA", groups={"update": Group("A", "B")}),
}


def kind_with(slots: set[str]) -> str:
    """The kind that these slots are of, complete or not: the first with a slot that LoRA lacks, or LoRA."""
    own = slots.difference(TABLE["lora"].slots)
    return next((name for name, kind in TABLE.items() if not own.isdisjoint(kind.slots)), "lora") if own else "lora"
