"""The four kinds of adapter as values: each one says what it adds to a base weight.

A base weight W0 is (out_features, in_features). Every kind defines one effective weight W'; its delta is W' − W0. The
formulas: docs/mathematics.md#the-four-kinds. One formula per kind, and several ways to it, which tests hold equal:

    delta(W0)                    the matrix, differentiable: what the others are tested against
    forward(x, W0)               x·(W0 + delta)ᵀ in training and use: the delta is never formed (thin kinds), or formed
                                 in tiles that are forgotten and formed again for the gradient (Dual LoRA)
    update()                     ΔW before any normalisation, as factors in float64: exact norms, spectra and inner
                                 products at the cost of the factors; None for Dual LoRA, which has none
    triple(W0)                   ‖w‖², <w,u>, ‖u‖² per vector, which add up over tiles: all that a kind that normalises
                                 needs of whole vectors, and all that drift needs
    take(out=, in_=)             the adapter of a part of W0; its delta, given the triple of the whole, is that part of
                                 the delta: any delta in tiles of any shape, for measures and tests
    over_tiles(dtype, strength)  the same for merging, where speed counts: what tiles share is computed once, sums are
                                 taken again in float64 where norms nearly cancel, and W0 is overwritten by the sum
"""

from d2surgery.adapters.adapter import Adapter
from d2surgery.adapters.d2lora import D2LoRA
from d2surgery.adapters.dora import DoRA
from d2surgery.adapters.duallora import DualLoRA
from d2surgery.adapters.lora import LoRA

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LoRA, DoRA, DualLoRA, D2LoRA)}
__all__ = ["KINDS", "Adapter", "D2LoRA", "DoRA", "DualLoRA", "LoRA"]
