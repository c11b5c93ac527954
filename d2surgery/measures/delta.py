"""An adapter's delta W' − W0, formed tile by tile in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.vectors import Triple
from d2surgery.errors import refuse

_TILE = 1 << 18  # entries


class Delta:
    """An adapter's delta, formed tile by tile in float64; vectors are normalised by the triple of the whole."""

    def __init__(self, adapter: Adapter, base_weight: Tensor | None) -> None:
        if base_weight is None and adapter.normalises:
            raise refuse("USAGE", "this delta depends on the base weight", got=adapter.kind)
        self.adapter = adapter
        self.shape = adapter.out_features, adapter.in_features
        device = next(iter(adapter.slots().values())).device
        self.base = torch.zeros((), device=device).expand(self.shape) if base_weight is None else base_weight
        if tuple(self.base.shape) != self.shape:
            raise refuse("SHAPE_MISMATCH", "the base weight", wanted=str(self.shape), got=str(tuple(self.base.shape)))
        self.triple = self._triple() if adapter.normalises else None

    def tiles(self) -> Iterator[Tensor]:
        """Cut across the longer side, so that each tile holds the smaller side whole."""
        out, in_ = self.shape
        if out >= in_:
            yield from (self.tile(out=cut) for cut in cuts(out, in_))
        else:
            yield from (self.tile(in_=cut) for cut in cuts(in_, out))

    def tile(self, *, out: slice = slice(None), in_: slice = slice(None)) -> Tensor:
        triple = self.triple
        if triple is not None:
            along = out if self.adapter.along == "out_features" else in_
            triple = Triple(*(sums[along] for sums in triple))
        return self.adapter.take(out=out, in_=in_).delta(self.base[out, in_].double(), triple)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole, each entry computed in float64 and rounded once."""
        whole = torch.empty(self.shape, dtype=dtype, device=self.base.device)
        for cut in cuts(*self.shape):
            whole[cut] = self.tile(out=cut)
        return whole

    def _triple(self) -> Triple:
        """Each vector is cut, not the set of vectors: the norms of the update then cost one small QR per tile."""
        out, in_ = self.shape
        if self.adapter.along == "in_features":
            parts = (self.adapter.take(out=cut).triple(self.base[cut].double()) for cut in cuts(out, in_))
        else:
            parts = (self.adapter.take(in_=cut).triple(self.base[:, cut].double()) for cut in cuts(in_, out))
        whole = next(parts)
        for part in parts:
            whole = whole.plus(part)
        return whole


def cuts(length: int, width: int) -> Iterator[slice]:
    """Ranges of a side that together with the other side make tiles of about _TILE entries."""
    step = max(_TILE // max(width, 1), 4)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
