"""A fifth kind and another format, each in one module of its own, go all the way without a change to the package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_format
import toy_kind
from models import gpt2, llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import d2surgery
from d2surgery.adapters import LoRA
from d2surgery.cli import main

MODULES = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc")  # stored (in, out): rows of W0 cross tiles


def base_of(directory: Path, model: nn.Module) -> Path:
    model.save_pretrained(directory)  # type: ignore[operator]
    return directory


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def scaled(out: int, in_: int, seed: int) -> toy_kind.Scaled:
    A, B = numbers(3, in_, seed=seed), numbers(out, 3, seed=seed + 1)
    return toy_kind.Scaled(A=A, B=B, scale=1 + 0.1 * numbers(out, seed=seed + 2), scaling=0.01)


def effective(adapter: toy_kind.Scaled, W0: Tensor) -> Any:
    """By the formula, in float64."""
    W, A, B, scale = (t.double().numpy() for t in (W0, adapter.A, adapter.B, adapter.scale))
    whole = W + adapter.scaling * B @ A
    return scale[:, None] * np.linalg.norm(W, axis=1)[:, None] * whole / np.linalg.norm(whole, axis=1)[:, None]


def inspected(adapter: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["inspect", str(adapter), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_fifth_kind_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_kind.register(monkeypatch)
    monkeypatch.setattr("d2surgery.merging.tiles.TILE_ENTRIES", 256)
    base = base_of(tmp_path / "base", gpt2())
    stored = load_file(base / "model.safetensors")
    shapes = {module: stored[f"{module}.weight"].T.shape for module in MODULES}
    adapters = {module: scaled(out, in_, seed) for seed, (module, (out, in_)) in enumerate(shapes.items())}
    d2surgery.save(d2surgery.from_adapters(adapters), tmp_path / "adapter")

    back = d2surgery.load(tmp_path / "adapter")
    assert back.layout.problems == ()
    for module, adapter in adapters.items():
        assert isinstance(back[module], toy_kind.Scaled)
        assert all(torch.equal(slot, adapter.slots()[name]) for name, slot in back[module].slots().items())
    assert {module["kind"] for module in inspected(tmp_path / "adapter", capsys)["modules"]} == {"scaled"}

    d2surgery.merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="F32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for module, adapter in adapters.items():
        wanted = effective(adapter, stored[f"{module}.weight"].T)
        np.testing.assert_allclose(merged[f"{module}.weight"].T.numpy(), wanted, rtol=3e-7, atol=1e-9)

    assert d2surgery.audit(base, tmp_path / "adapter", tmp_path / "merged").verdict == "pass"
    merged[f"{MODULES[0]}.weight"] = stored[f"{MODULES[0]}.weight"]
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    broken = d2surgery.audit(base, tmp_path / "adapter", tmp_path / "merged")
    assert broken.verdict == "fail"
    assert "DELTA_NOT_APPLIED" in {problem.code for problem in broken.reasons}


def test_a_fifth_kind_is_attached_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_kind.register(monkeypatch)
    model, ids = llama(), torch.tensor([[1, 5, 9, 3]])
    before = model(ids).logits
    d2surgery.attach(model, d2surgery.initial(model, "scaled", ["down_proj", "lm_head"], rank=2, scaling=1.0))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    learnt = d2surgery.detach(model)
    assert all((adapter.slots()["scale"] != 1).any() for adapter in learnt.values())


def test_another_format_is_written_recognised_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_format.register(monkeypatch)
    adapters = {f"layers.{n}.q": LoRA(A=numbers(2, 5, seed=n), B=numbers(6, 2, seed=9), scaling=0.5) for n in range(2)}
    checkpoint = d2surgery.from_adapters(adapters)
    d2surgery.save(checkpoint, tmp_path / "toy", format="toy")
    back = d2surgery.load(tmp_path / "toy")
    assert (back.layout.format, back.layout.problems) == ("toy", ())
    for module, adapter in adapters.items():
        assert back[module].scaling == 0.5
        assert all(torch.equal(slot, adapter.slots()[name]) for name, slot in back[module].slots().items())
    shown = inspected(tmp_path / "toy", capsys)
    assert (shown["format"], shown["tensors_accounted"], len(shown["modules"])) == ("toy", 6, 2)
    d2surgery.save(back, tmp_path / "peft")
    again = d2surgery.load(tmp_path / "peft")
    assert again.layout.format == "peft"
    assert all(torch.equal(again[m].slots()["A"], a.A) for m, a in adapters.items())


def test_a_format_says_what_it_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_format.register(monkeypatch)
    W = numbers(6, 5, seed=3)
    checkpoint = d2surgery.from_adapters({"q": d2surgery.DoRA.init(W, rank=2, scaling=1.0)})
    with pytest.raises(d2surgery.D2SurgeryError, match="toy has no place for dora on linear modules"):
        d2surgery.save(checkpoint, tmp_path / "toy", format="toy")
    with pytest.raises(d2surgery.D2SurgeryError, match="no such format"):
        d2surgery.save(checkpoint, tmp_path / "toy", format="nonsense")
    assert not (tmp_path / "toy").exists()
