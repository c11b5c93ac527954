"""A seeded fault that stands for every processor: products in float32 that err as much as any order of summing may."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORS = {aten.mm: 0, aten.mv: 0, aten.dot: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1}  # the first one's position


class AnyOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A·B in float32 plus up to k·u·|A||B| per entry, k the length of the sums and u = 2⁻²⁴: however a library orders a
    sum, it errs by no more (Higham, Accuracy and Stability, section 3.1). All to one side, as sums of equal terms err,
    which side the seed decides. Of this thread only."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.side = 1 - 2 * (seed % 2)
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = FACTORS.get(func.overloadpacket)
        if first is None or result.dtype != torch.float32:
            return result
        A, B = args[first], args[first + 1]
        self.products += 1
        return result.add_(self._noise(A, B), alpha=float((kwargs or {}).get("alpha", 1)))

    def _noise(self, A: Tensor, B: Tensor) -> Tensor:
        size = A.abs().double() @ B.abs().double()
        share = torch.rand(size.shape, generator=self.generator, dtype=torch.float64)
        return (self.side * A.shape[-1] * 2**-24 * share * size).float()
