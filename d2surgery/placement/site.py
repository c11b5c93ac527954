"""Site: all that happens to one tensor of the base; Patch: one adapter on some of its rows."""

import re
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from d2surgery.formats.layout import Rows

OUTPUTS = ("lm_head", "embed_out")  # their rows are tokens, also where they are not tied


_HEAD = re.compile(r"(.*\.)?(score|classifier(\.(out_proj|linear_out|\d+))?|classification_head\.out_proj|logits_proj)")


def is_head(tensor: str) -> bool:
    """Whether a tensor is a classification head's weight or bias, by its name: its rows are labels."""
    return _HEAD.fullmatch(tensor.rpartition(".")[0]) is not None


class Patch(NamedTuple):
    """One adapter on a range of rows of a stored tensor, seen as the matrix (prod(shape[:-1]) or shape[0], rest).

    `transposed`: the rows of the tensor are in_features of the adapter, not out_features.
    `out`: from which to which out_features of the adapter land here (one expert's gate, say; None: to the last);
    `expert`: of which expert.
    """

    module: str
    start: int
    stop: int
    transposed: bool = False
    out: tuple[int, int | None] = (0, None)
    expert: int = 0


@dataclass(frozen=True, kw_only=True)
class Site:
    """All that happens to one tensor: replaced by `replacement`, rows replaced, then patched, bias added."""

    source: str | None  # the base tensor; None when the adapter brings a tensor that the base lacks
    shape: tuple[int, ...]  # of the result
    patches: tuple[Patch, ...] = ()  # by their rows, which do not overlap and need not cover the tensor
    replacement: str | None = None  # key in the adapter file
    rows: Rows | None = None
    bias: str | None = None  # the module whose scaling times "bias" slot is added

    @property
    def matrix(self) -> tuple[int, int]:
        """The tensor as rows and columns: experts are stacked, a convolution's kernel lies along its row."""
        rows = prod(self.shape[:-1]) if len(self.shape) == 3 and self.stacked else (self.shape or (1,))[0]
        return rows, prod(self.shape) // rows if rows else 0

    @property
    def stacked(self) -> bool:
        return any(patch.stop - patch.start != self.shape[0] for patch in self.patches)
