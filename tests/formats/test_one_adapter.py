"""One adapter as every format has it: the same effective weights, merged, audited and carried from one to the next."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file
from toy_llama import DORA, LORA, Toy, per_input, save_base, toy

import d2surgery
from d2surgery.checkpoint import Checkpoint, differences, load
from d2surgery.files.base import BaseWeights
from d2surgery.formats import FORMATS, with_base

WRITERS = {
    "lora": ("kohya", "lycoris", "diffusers", "mlx", "gguf", "peft-serving", "peft"),
    "dora": ("lycoris", "diffusers", "mlx", "peft"),
}


def opened(adapter: Path, base: Path) -> Checkpoint:
    """With the names and heads that the base has."""
    return load(adapter, base=BaseWeights(base))


def assert_effective(checkpoint: Checkpoint, of: Toy, along: str = "out") -> None:
    assert set(checkpoint.layout.adapters) == set(of.A)
    assert checkpoint.layout.problems == ()
    for module in of.A:
        W = of.W[module]
        delta = checkpoint[module].delta(torch.from_numpy(W).double()).numpy()
        np.testing.assert_allclose(W + delta, of.effective(module, along), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", LORA)
def test_a_lora_of_every_format_has_the_same_effective_weights(tmp_path: Path, name: str) -> None:
    adapter = toy()
    base = save_base(adapter, tmp_path / "base")
    assert_effective(opened(LORA[name](adapter, tmp_path / name), base), adapter)


@pytest.mark.parametrize("name", DORA)
def test_a_dora_of_every_format_has_the_same_effective_weights(tmp_path: Path, name: str) -> None:
    adapter = toy(dora=True)
    base = save_base(adapter, tmp_path / "base")
    assert_effective(opened(DORA[name](adapter, tmp_path / name), base), adapter)


def test_trap_1_a_magnitude_per_input_is_another_model_and_both_are_right(tmp_path: Path) -> None:
    adapter = toy(dora=True, along="in")
    base = save_base(adapter, tmp_path / "base")
    checkpoint = opened(per_input(adapter, tmp_path / "in"), base)
    assert {entry.settings["along"] for entry in checkpoint.layout.adapters.values()} == {"in_features"}
    assert_effective(checkpoint, adapter, "in")
    q = "model.layers.0.self_attn.q_proj"
    assert np.abs(adapter.effective(q, "in") - adapter.effective(q, "out")).max() > 0.01


@pytest.mark.parametrize("name", LORA)
def test_it_merges_onto_its_base_and_the_merge_passes_the_audit(tmp_path: Path, name: str) -> None:
    adapter = toy()
    base, file = save_base(adapter, tmp_path / "base"), LORA[name](adapter, tmp_path / name)
    d2surgery.merge(base, file, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in adapter.A:
        wanted = adapter.effective(module)
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), wanted, rtol=2e-6, atol=2e-7)
    assert d2surgery.audit(base, file, tmp_path / "out").verdict == "pass"


@pytest.mark.parametrize("along", ["out", "in"])
def test_a_dora_merges_and_passes_the_audit_on_both_axes(tmp_path: Path, along: str) -> None:
    adapter = toy(dora=True, along=along)
    base = save_base(adapter, tmp_path / "base")
    file = (per_input if along == "in" else toy_llama.kohya)(adapter, tmp_path / "adapter")
    d2surgery.merge(base, file, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in adapter.A:
        wanted = adapter.effective(module, along)
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), wanted, rtol=2e-6, atol=2e-7)
        changed = torch.from_numpy(wanted).float()
        changed[0, 0] += 0.5
        merged[f"{module}.weight"] = changed
    assert d2surgery.audit(base, file, tmp_path / "out").verdict == "pass"
    toy_llama.save(merged, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert d2surgery.audit(base, file, tmp_path / "out").verdict == "fail"


@pytest.mark.parametrize("kind", WRITERS)
def test_it_goes_from_each_format_to_the_next_and_stays_the_same(tmp_path: Path, kind: str) -> None:
    adapter = toy(dora=kind == "dora")
    base = save_base(adapter, tmp_path / "base")
    first = checkpoint = opened(toy_llama.diffusers(adapter, tmp_path / "0"), base)
    for at, form in enumerate((*WRITERS[kind], WRITERS[kind][0])):
        out = tmp_path / f"{at + 1} {form}"
        d2surgery.save(checkpoint, out, format=form)
        checkpoint = opened(out, base)
        assert set(differences(first, checkpoint).values()) == {0.0}, form
        assert_effective(checkpoint, adapter)


@pytest.mark.parametrize("form", WRITERS["lora"])
def test_ranks_and_scalings_of_each_module_survive_a_format_of_one(tmp_path: Path, form: str) -> None:
    """Zero-padded and folded where one rank or one scaling is all that there is."""
    adapter = toy()
    base = save_base(adapter, tmp_path / "base")
    adapters = {}
    for at, (module, each) in enumerate(opened(toy_llama.mlx(adapter, tmp_path / "mlx"), base).items()):
        part = d2surgery.LoRA(A=each.slots()["A"][: 2 + at], B=each.slots()["B"][:, : 2 + at], scaling=0.3 * (at + 1))
        adapters[module] = part
    weights = BaseWeights(base)
    made = d2surgery.from_adapters(adapters)
    made = Checkpoint(with_base(made.layout, weights.header.tensors, weights.config))
    d2surgery.save(made, tmp_path / "out", format=form)
    assert max(differences(made, opened(tmp_path / "out", base)).values()) < 1e-7


def test_every_kind_that_a_format_says_it_holds_is_written_and_read_and_others_are_refused(tmp_path: Path) -> None:
    adapter = toy(dora=True)
    base = save_base(adapter, tmp_path / "base")
    lora, dora = (opened(toy_llama.mlx(toy(dora=d), tmp_path / f"mlx {d}"), base) for d in (False, True))
    for format in FORMATS[:-1]:
        for kind, checkpoint in (("lora", lora), ("dora", dora)):
            out = tmp_path / f"{format.NAME} {kind}"
            if (format.NAME, kind) == ("comfyui", "lora"):  # of image models' names: see test_comfyui
                with pytest.raises(d2surgery.D2SurgeryError, match="AMBIGUOUS_NAME"):
                    d2surgery.save(checkpoint, out, format=format.NAME)
                assert not out.exists()
            elif "linear" in format.holds(kind):
                d2surgery.save(checkpoint, out, format=format.NAME)
                assert opened(out, base).layout.kinds == [kind]
            else:
                with pytest.raises(d2surgery.D2SurgeryError, match="FORMAT_CANNOT_HOLD") as error:
                    d2surgery.save(checkpoint, out, format=format.NAME)
                assert {"--kind lora --max-error", "merge"} <= {
                    word for word in ("--kind lora --max-error", "merge") if word in error.value.problems[0].remedy
                }
                assert not out.exists()


def test_what_does_not_read_back_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = d2surgery.load(toy_llama.diffusers(toy(), tmp_path / "a"))
    wrong = lambda adapter, rank, scaling: {name: 2 * slot for name, slot in adapter.slots().items()}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("d2surgery.formats.saving.brought_to", wrong)
        with pytest.raises(d2surgery.D2SurgeryError, match="READ_BACK_DIFFERS"):
            d2surgery.save(checkpoint, tmp_path / "out", format="mlx")
    q = "model.layers.0.self_attn.q_proj"
    numbers = {m: a.slots() for m, a in checkpoint.items()}
    numbers[q]["B"] = numbers[q]["B"] * float("nan")
    broken = {m: d2surgery.LoRA(A=s["A"], B=s["B"], scaling=0.5) for m, s in numbers.items()}
    with pytest.raises(d2surgery.D2SurgeryError, match="NOT_FINITE"):
        d2surgery.save(d2surgery.from_adapters(broken), tmp_path / "out", format="kohya")
    assert list((tmp_path / "out").iterdir()) == []
