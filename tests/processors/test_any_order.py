"""What a record calls exact holds however float32 products are summed, on any processor."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import KINDS_AND_AXES, make, normal
from processors.sloppy import AnyOrder
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery.adapters.forwards import Axis
from d2surgery.auditing import audit
from d2surgery.checkpoint import from_adapters, save
from d2surgery.formats.layout import About
from d2surgery.measures.dense import head_tail
from d2surgery.measures.drift import delta_drift
from d2surgery.measures.likeness import compared, profile
from d2surgery.measures.ranks import NUMBERS
from d2surgery.measures.spectrum import delta_spectrum, update_spectrum
from d2surgery.measures.subspace import agreement, amplification, cosine, directions, intruders, overlaps, similarity
from d2surgery.merging import merge
from d2surgery.merging.tiles import Tile, TileMerger

pytestmark = pytest.mark.numerical
SEEDS = range(3)
AXES: tuple[Axis, Axis] = ("out_features", "in_features")


def graded(rows: int, columns: int, ratio: float) -> Tensor:
    """Singular values 1, ratio, ratio², …"""
    side = min(rows, columns)
    U, V = (torch.linalg.qr(normal(n, side, seed=n)).Q for n in (rows, columns))
    matrix: Tensor = (U * ratio ** torch.arange(side, dtype=torch.float64)) @ V.T
    return matrix


MATRICES = {
    "constant": torch.full((300, 310), 0.5),
    "rank one": torch.outer(normal(310, seed=0), normal(300, seed=1)),
    "falling": graded(320, 400, 0.9),
    "falling slowly": graded(400, 320, 0.99),
    "equal": torch.eye(300),
    "random": normal(300, 400, seed=3),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MATRICES)
def test_what_head_and_tail_call_exact_is_exact(name: str, seed: int) -> None:
    matrix = MATRICES[name].float()
    true = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    with AnyOrder(seed) as fault:
        found = head_tail(matrix)
    assert fault.products > 50
    head = found.singular_values.numpy()
    assert np.abs(head - true[: len(head)]).max(initial=0) <= found.error_bound * true[0]
    assert found.frobenius_norm == pytest.approx(float(np.sqrt((true**2).sum())), rel=1e-13)
    assert true.sum() <= found.nuclear_norm_bound * (1 + 1e-12)
    assert {number for number in NUMBERS if found.quality[number] == "exact"} == {"frobenius_norm"}
    if name in ("constant", "rank one", "falling"):
        assert found.spectral_norm == pytest.approx(true[0], rel=1e-9)
        assert found.error_bound < 1e-4


def test_the_fault_shows_in_a_value_of_float32_products() -> None:
    """As the constant matrix did on a processor with AVX-512: 152.48004 for 152.47951."""
    matrix, vector = MATRICES["constant"], torch.full((1, 300), 300**-0.5)
    with AnyOrder(0):
        found = float((vector @ matrix).norm())
    assert found != pytest.approx(0.5 * sqrt(300 * 310), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_every_measure_is_of_float64_products(kind: str, axis: Axis, dtype: torch.dtype) -> None:
    """No float32 product is formed on the way to a number: drift, angles, spectra, subspaces, signs, intruders."""
    W = (0.02 * normal(60, 72, seed=0)).to(dtype)
    adapter, other = make(kind, W, axis, size=0.01), make(kind, W, axis, size=0.01, seed=5)
    with AnyOrder(0) as fault:
        for along in AXES:
            delta_drift(adapter, W, along)
        delta_spectrum(adapter, W)
        intruders(adapter, W)
        first, second = adapter.update(), other.update()
        if first is not None and second is not None:
            update_spectrum(adapter)
            amplification(first, W)
            cosine(overlaps(directions(first), directions(second)))
            similarity(overlaps(directions(first), directions(second)))
            compared(profile(adapter), profile(other))
            agreement(first, second)
    assert fault.products == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_summed_in_any_order_passes_with_one_note(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, differing, products = [f"model.layers.{i}.up" for i in range(3)], 0, 0
    base = {f"{name}.weight": (0.02 * normal(160, 192, seed=i)).to(dtype) for i, name in enumerate(names)}
    write_model(tmp_path / "base", base)
    for number, (kind, axis) in enumerate(KINDS_AND_AXES):
        adapter, merged = tmp_path / f"adapter{number}", tmp_path / f"merged{number}"
        save(from_adapters({m: make(kind, base[f"{m}.weight"], axis, size=0.05, seed=number) for m in names}), adapter)
        products += merged_in_any_order(monkeypatch, 0, tmp_path / "base", adapter, merged)
        found = audit(tmp_path / "base", adapter, merged)
        assert found.verdict == "pass", (kind, axis, found.reasons)
        assert [(r.code, r.severity) for r in found.reasons] in ([], [("OTHER_ROUNDING", "info")]), (
            kind,
            axis,
            found.reasons,
        )
        differing += sum(module.mismatched_elements for module in found.modules.values())
    assert products > 0
    assert differing > 0


@pytest.mark.parametrize("damaged", [False, True])
def test_a_tied_tensor_that_such_a_file_holds_twice(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second copy is as right as the first, and wrong where it differs from it."""
    tokens = 0.02 * normal(192, 160, seed=0).half()
    write_model(tmp_path / "base", {"model.embed_tokens.weight": tokens})
    learnt = {"model.embed_tokens": make("lora", tokens.T, rank=32, size=1)}
    save(from_adapters(learnt, About(tied=True), embeddings=learnt), tmp_path / "adapter")
    merged_in_any_order(monkeypatch, 1, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if damaged:
        weights["lm_head.weight"][7, 9] *= 1.5
    write_model(tmp_path / "merged", weights)
    found = audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", files=False)
    assert found.modules["model.embed_tokens"].mismatched_elements > 0
    assert [r.code for r in found.reasons] == ["OTHER_ROUNDING", "TENSOR_CHANGED"][: 1 + damaged]


def write_model(directory: Path, weights: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text('{"tie_word_embeddings": true}')


def merged_in_any_order(monkeypatch: pytest.MonkeyPatch, seed: int, base: Path, adapter: Path, out: Path) -> int:
    """Merge with the fault in every thread; how many products it met."""
    products, original = [], TileMerger.merge

    def faulty(self: TileMerger, tile: Tile, raw: Tensor) -> Tensor:
        with AnyOrder(seed) as fault:
            made = original(self, tile, raw)
        products.append(fault.products)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(TileMerger, "merge", faulty)
        merge(base, adapter, out)
    return sum(products)
