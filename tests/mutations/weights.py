"""Weights as those of real models: heavy-tailed rows, outlier columns, spectra that decay; adapters as trained ones."""

from functools import cache

import torch
from torch import Tensor


@cache
def realistic(out_features: int, in_features: int, seed: int) -> Tensor:
    """Singular values fall like i^−0.4 above a bulk; Student's t with 5 degrees of freedom; row norms spread over a
    factor of three, a hundredth of the columns five times as large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tails = (
        normal(out_features, in_features) / (sum(normal(out_features, in_features) ** 2 for _ in range(5)) / 5) ** 0.5
    )
    U, S, V = torch.linalg.svd(tails, full_matrices=False)
    weight = U @ torch.diag(S * torch.arange(1, len(S) + 1).double() ** -0.2) @ V
    weight = weight * torch.exp(0.3 * normal(out_features))[:, None]
    outliers = torch.randperm(in_features, generator=generator)[: max(in_features // 100, 1)]
    weight[:, outliers] *= 5
    sized: Tensor = 0.04 * weight / weight.std()
    return sized.float()


def trained(weight: Tensor, rank: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Factors (A, B) whose product has `size` of the weight's norm and singular values that fall like i^−1."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
    B = torch.randn(weight.shape[0], rank, generator=generator) / torch.arange(1, rank + 1)
    return A, B * (size * float(weight.norm() / (B @ A).norm()))
