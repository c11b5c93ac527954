"""Layout: every tensor of an adapter file in exactly one place, from names and shapes only.

A slot of an adapter, a replacement of a base tensor, replaced rows of one, `superseded` by a better copy, or `unread`:
a problem names the last two.
Nothing here reads tensor data or imports torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2surgery.errors import Problem
from d2surgery.files.header import Header

Stored = Literal["linear", "embedding", "conv", "experts"]

RANK_GROUPS: dict[str, dict[str, str]] = {
    # kind -> group -> the down factor whose rows count its rank. The order of kinds is the order of detection.
    "duallora": {"magnitude": "A", "direction": "C"},
    "d2lora": {"plus": "A_plus", "minus": "A_minus"},
    "dora": {"update": "A"},
    "lora": {"update": "A"},
}
NAMES = {"lora": "LoRA", "dora": "DoRA", "duallora": "Dual LoRA", "d2lora": "D2-LoRA"}  # kind -> as people write it
PAIRS = {"A": "B", "C": "D", "A_plus": "B_plus", "A_minus": "B_minus"}  # down factor -> up factor


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """What was learnt for one module: which tensors of the file fill which slots, and what their config says.

    `module` is the dotted name in the base model without `.weight`; for an expert parameter, the parameter's name.
    Shapes are those of the (out_features, in_features) update; a conv's kernel is flattened into in_features.
    """

    module: str
    kind: str
    stored: Stored
    slots: Mapping[str, str]  # slot -> key in the file; "bias" is lora_bias's addition to the bias
    ranks: Mapping[str, int]  # group -> rank; per expert for experts
    out_features: int
    in_features: int
    dtype: str
    scaling: float | None  # None: unknown, the numbers are known up to scale
    along: str | None = None
    tau: float | None = None
    form: str | None = None
    experts: int = 1

    @property
    def rank(self) -> int | None:
        """The bound on the rank of the update: r; 2r for D2-LoRA; None for Dual LoRA, whose update has no bound."""
        return None if self.kind == "duallora" else sum(self.ranks.values())


@dataclass(frozen=True)
class Rows:
    """Trained token rows: row `indices[i]` of the base tensor becomes row i of the tensor under `key`."""

    key: str
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An adapter file by names and shapes."""

    path: Path
    format: str
    header: Header
    config: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, AdapterLayout] = field(default_factory=dict)  # by module
    replacements: Mapping[str, str] = field(default_factory=dict)  # base tensor name -> key
    rows: Mapping[str, Rows] = field(default_factory=dict)  # base tensor name -> rows
    superseded: tuple[str, ...] = ()  # copies of what another key holds as it was trained
    unread: tuple[str, ...] = ()  # keys that a problem explains
    problems: tuple[Problem, ...] = ()

    @property
    def kinds(self) -> list[str]:
        return sorted({adapter.kind for adapter in self.adapters.values()})

    @property
    def base_model(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def accounted(self) -> Iterator[str]:
        """The keys that have a place other than `unread`, each once."""
        for adapter in self.adapters.values():
            yield from adapter.slots.values()
        yield from self.replacements.values()
        yield from (rows.key for rows in self.rows.values())
        yield from self.superseded
