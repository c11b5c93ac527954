"""The four kinds of adapter as values: each one says what it adds to a base weight.

A base weight W0 is (out_features, in_features). Every kind defines one effective weight W'; its delta is W' − W0.
"""

from d2surgery.adapters.adapter import Adapter
from d2surgery.adapters.d2lora import D2LoRA
from d2surgery.adapters.dora import DoRA
from d2surgery.adapters.duallora import DualLoRA
from d2surgery.adapters.lora import LoRA

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LoRA, DoRA, DualLoRA, D2LoRA)}
__all__ = ["KINDS", "Adapter", "D2LoRA", "DoRA", "DualLoRA", "LoRA"]
