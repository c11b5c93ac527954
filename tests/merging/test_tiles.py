"""Tiles: the grid covers every row once, and vectors whose norm nearly cancels across tiles are summed again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from d2surgery import BaseWeights, D2LoRA, from_adapters, merge, save
from d2surgery.files.header import TensorInfo
from d2surgery.merging.tiles import TILE_ENTRIES, Output, grid
from d2surgery.placement.site import Patch, Site


@given(rows=st.integers(1, 5000), columns=st.sampled_from([1, 7, 2048, 1 << 19, 1 << 22]))
def test_the_grid_covers_every_row_once_and_has_no_short_tail(rows: int, columns: int) -> None:
    info = TensorInfo(Path("x"), "BF16", (rows, columns), 0, 2 * rows * columns)
    site = Site(source="w", shape=(rows, columns), patches=(Patch("m", 0, rows),))
    found = list(grid(Output("w", info, "BF16", site)))
    positions = [tile.start for tile in found] + [info.nbytes]
    assert [tile.nbytes for tile in found] == np.diff(positions).tolist()
    assert [position % (2 * columns) for position in positions] == [0] * len(positions)
    sizes = (np.diff(positions) // (2 * columns)).tolist()
    assert sum(sizes) == rows
    assert min(sizes) * 2 >= max(sizes) - 1
    assert all(size * columns <= max(2 * TILE_ENTRIES, 8 * columns) for size in sizes)


def test_norms_that_nearly_cancel_across_tiles_keep_their_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2surgery.merging.tiles.TILE_ENTRIES", 16 * 48)
    generator = torch.Generator().manual_seed(6)
    B, A = torch.randn(96, 2, generator=generator), torch.randn(2, 48, generator=generator)
    zeros = (torch.zeros(2, 48), torch.zeros(96, 2))
    W = (-1.001 * (B @ A)).bfloat16()  # so W + B·A is about a thousandth of W: its norm is lost in float32 sums
    adapter = D2LoRA(A_plus=A, B_plus=B, A_minus=zeros[0], B_minus=zeros[1], scaling=1.0)
    (tmp_path / "base").mkdir()
    save_file({"up.weight": W}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    save(from_adapters({"up": adapter}), tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    w, u = W.double().numpy(), (B.double() @ A.double()).numpy()
    wanted = (w + u) * np.sqrt((w**2).sum(0) / ((w + u) ** 2).sum(0)) + u
    merged = BaseWeights(tmp_path / "out")["up.weight"].double().numpy()
    # w + u itself is a float32 sum of products: 1e-7 of w, times a gain of several hundred, beside bfloat16's 4e-3.
    np.testing.assert_allclose(merged, wanted, rtol=2**-8, atol=2e-4 * np.abs(wanted).max())
