"""Merges that are right and merges that are wrong: what an audit must say of each.

One tiny Llama (hidden 64, two layers, grouped-query attention with biases) per dtype, adapters of every kind with a
realistic update (1 % of the base; 0.1 % where a case says so), written by PEFT where PEFT has the kind. A `Case` names
how the merged directory comes about, the verdict, and the codes. Weights by formula are numpy's long double, rounded
once: independent of the engine under test. Mergers that do not install beside this project's pins are their
arithmetic again, in the order and the precision of their source (`elsewhere`).
"""

from mutations.cases import cases, part
from mutations.changes import base_again, both, damaged, formula, nothing, strength, tensor
from mutations.world import DTYPES, KINDS, MODULES, NORM, OUT, Case, Q, World

__all__ = [
    "DTYPES", "KINDS", "MODULES", "NORM", "OUT", "Case", "Q", "World", "base_again", "both", "cases", "damaged",
    "formula", "nothing", "part", "strength", "tensor",
]  # fmt: skip
