"""Damage of every shape to a merged weight, by what it moves: rows, columns, blocks, sizes, signs, ranks, all."""

from collections.abc import Callable

import torch
from torch import Tensor

Damage = Callable[[Tensor, Tensor], Tensor]  # (merged, base) in float64 -> what the file then holds, before rounding


def part(where: object, f: Callable[[Tensor], Tensor]) -> Damage:
    def damage(merged: Tensor, base: Tensor) -> Tensor:
        out = merged.clone()
        out[where] = f(out[where])  # type: ignore[index]
        return out

    return damage


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda t: factor * t


def _sizes(count: int, f: Callable[[Tensor], Tensor], *, largest: bool = True) -> Damage:
    def damage(merged: Tensor, base: Tensor) -> Tensor:
        at = merged.abs().flatten().topk(count, largest=largest).indices
        out = merged.flatten().clone()
        out[at] = f(out[at])
        return out.view(merged.shape)

    return damage


def _noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank_noise(share: float, rank: int = 1) -> Damage:
    """Of `share` of the delta's norm."""

    def damage(merged: Tensor, base: Tensor) -> Tensor:
        out, in_ = merged.shape
        noise = _noise(torch.Size((out, rank)), 1) @ _noise(torch.Size((rank, in_)), 2)
        return merged + noise * (share * float((merged - base).norm() / noise.norm()))

    return damage


def smoothed(share: float) -> Damage:
    return lambda merged, base: (1 - share) * merged + share * (merged.roll(1, 1) + merged.roll(-1, 1)) / 2


def clipped(quantile: float) -> Damage:
    def damage(merged: Tensor, base: Tensor) -> Tensor:
        edge = float(merged.abs().flatten().sort().values[int(quantile * (merged.numel() - 1))])
        return merged.clamp(-edge, edge)

    return damage


def base_again(where: object) -> Damage:
    def damage(merged: Tensor, base: Tensor) -> Tensor:
        out = merged.clone()
        out[where] = base[where]  # type: ignore[index]
        return out

    return damage


def at_strength(strength: float, where: object) -> Damage:
    """The delta, in a shard."""

    def damage(merged: Tensor, base: Tensor) -> Tensor:
        out = merged.clone()
        out[where] = (base + strength * (merged - base))[where]  # type: ignore[index]
        return out

    return damage


def swapped(first: int, second: int, dim: int) -> Damage:
    def damage(merged: Tensor, base: Tensor) -> Tensor:
        order = torch.arange(merged.shape[dim])
        order[[first, second]] = order[[second, first]]
        return merged.index_select(dim, order)

    return damage


ALL = slice(None)
ROW, COLUMN, WHOLE, SIZE = ("ROW_SCALED",), ("COLUMN_SCALED",), ("WEIGHT_DECAYED",), ("LARGEST_CHANGED",)
PARTIAL = ("PARTIAL_MERGE",)
SHIFT, BASE, OTHER = ("VALUES_SHIFTED",), ("PARTIAL_MERGE", "DELTA_NOT_APPLIED"), ("DELTA_UNEXPLAINED",)

# name -> what is done, and the codes that are a right cause
SHAPES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "one row × 1.01": (part(5, times(1.01)), ROW),
    "one row × 0.99": (part(6, times(0.99)), ROW),
    "one row × 1.05": (part(7, times(1.05)), ROW),
    "one row zeroed": (part(7, torch.zeros_like), (*ROW, "ZEROED")),
    "one row negated": (part(9, torch.neg), ROW),
    "one column × 1.01": (part((ALL, 5), times(1.01)), COLUMN),
    "one column × 0.95": (part((ALL, 8), times(0.95)), COLUMN),
    "one column zeroed": (part((ALL, 8), torch.zeros_like), (*COLUMN, "ZEROED")),
    "three rows × 1.02": (part([3, 11, 20], times(1.02)), ROW),
    "a head × 1.01": (part(slice(16, 32), times(1.01)), ROW),
    "a block × 1.01": (part((slice(16, 32), slice(16, 48)), times(1.01)), (*ROW, *COLUMN, *OTHER)),
    "every fourth row × 1.005": (part(slice(None, None, 4), times(1.005)), ROW),
    "every third column × 1.005": (part((ALL, slice(None, None, 3)), times(1.005)), COLUMN),
    "all × 0.999": (lambda m, b: 0.999 * m, WHOLE),
    "all × 1.001": (lambda m, b: 1.001 * m, WHOLE),
    "all × 0.99": (lambda m, b: 0.99 * m, (*WHOLE, *OTHER)),
    "rows × 1 ± 0.3 %": (lambda m, b: m * (1 + 0.003 * _noise(m.shape[:1], 3).sign()[:, None]), ROW),
    "columns × 1 ± 0.3 %": (lambda m, b: m * (1 + 0.003 * _noise(m.shape[1:], 3).sign()), COLUMN),
    "20 largest × 1.02": (_sizes(20, times(1.02)), SIZE),
    "20 largest × 0.97": (_sizes(20, times(0.97)), SIZE),
    "20 largest negated": (_sizes(20, torch.neg), SIZE),
    "100 smallest zeroed": (_sizes(100, torch.zeros_like, largest=False), (*SIZE, "ZEROED")),
    "outliers clipped at 99.5 %": (clipped(0.995), SIZE),
    "outliers clipped at 99 %": (clipped(0.99), SIZE),
    "a constant added, 0.2 % of the size": (lambda m, b: m + 0.002 * m.abs().mean(), SHIFT),
    "a constant added to a row": (part(4, lambda t: t + 0.03 * t.abs().mean()), SHIFT),
    "a constant added to a column": (part((ALL, 4), lambda t: t + 0.03 * t.abs().mean()), SHIFT),
    "columns shifted like a bias": (lambda m, b: m + 0.02 * m.abs().mean() * _noise(m.shape[1:], 4).sign(),
                                    (*SHIFT, *OTHER)),
    "rank-1 noise, the delta's size": (low_rank_noise(1.0), (*OTHER, "ANOTHER_ADAPTER")),
    "rank-2 noise, half of the delta": (low_rank_noise(0.5, 2), (*OTHER, "ANOTHER_ADAPTER")),
    "smoothed along rows by 2 %": (smoothed(0.02), (*WHOLE, *OTHER)),
    "a head as in the base": (base_again(slice(16, 32)), BASE),
    "a row as in the base": (base_again(3), (*BASE, *OTHER)),
    "half the columns as in the base": (base_again((ALL, slice(0, 24))), BASE),
    "the delta twice in a quarter of the rows": (at_strength(2, slice(0, 32)), PARTIAL),
    "the delta twice in some of the columns": (at_strength(2, (ALL, slice(32, 64))), PARTIAL),
    "the delta turned in a quarter of the rows": (at_strength(-1, slice(96, 128)), PARTIAL),
    "half of the delta in every second row": (at_strength(0.5, slice(None, None, 2)), PARTIAL),
    "two rows swapped": (swapped(3, 9, 0), (*OTHER, "HEADS_PERMUTED")),
    "two columns swapped": (swapped(3, 9, 1), (*OTHER, "HEADS_PERMUTED")),
    "columns moved on by one": (lambda m, b: m.roll(1, 1), (*OTHER, "WRONG_BASE", "WRONG_STRENGTH")),
    "one element × 1.5": (part((3, 5), times(1.5)), (*OTHER, *SIZE)),
    "one element of 3": (part((3, 5), lambda t: torch.full_like(t, 3.0)), (*OTHER, *SIZE)),
    "one sign turned": (part((3, 5), torch.neg), (*OTHER, *SIZE)),
    "noise in a row": (part(5, lambda t: t + 0.01 * t.abs().mean() * _noise(t.shape, 5)), OTHER),
    "noise in a column": (part((ALL, 5), lambda t: t + 0.01 * t.abs().mean() * _noise(t.shape, 5)), OTHER),
    "averaged with the base": (lambda m, b: (m + b) / 2, ("WRONG_STRENGTH",)),
}  # fmt: skip
