"""Surveys over adapters and bases on disk: every record is that of the module's own matrices."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import effective, make, normal
from safetensors.torch import save_file
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.checkpoint import Checkpoint, from_adapters, load, save
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights
from d2surgery.measures.drift import Drift
from d2surgery.measures.ranks import NUMBERS, Spectrum
from d2surgery.measures.spectrum import delta_spectrum
from d2surgery.surveying import modules as survey
from d2surgery.surveying.modules import differences, drifts, places, spectra

SHAPES = {"model.layers.0.q_proj": (24, 16), "model.layers.0.up_proj": (40, 16), "model.layers.1.q_proj": (24, 16)}
KINDS = ["lora", "dora", "d2lora", "duallora"]


def write_base(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> BaseWeights:
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return BaseWeights(directory)


def weights(shapes: Mapping[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    return {name: normal(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}


def adapters(kind: str, seed: int = 0) -> dict[str, Adapter]:
    return {name: make(kind, W, seed=10 * i + seed, gain=0.05) for i, (name, W) in enumerate(weights().items())}


@pytest.fixture
def base(tmp_path: Path) -> BaseWeights:
    return write_base(tmp_path / "base", {f"{name}.weight": W for name, W in weights().items()})


def stored(tmp_path: Path, kind: str, seed: int = 0) -> Checkpoint:
    directory = tmp_path / f"{kind}{seed}"
    save(from_adapters(adapters(kind, seed)), directory)
    return load(directory)


def true_spectrum(adapter: Adapter, W: Tensor) -> Tensor:
    delta = (effective(adapter, W) - W.double().numpy()).astype(np.float64)
    return torch.from_numpy(np.linalg.svd(delta, compute_uv=False))


# Spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_has_the_spectrum_of_its_delta(kind: str, tmp_path: Path, base: BaseWeights) -> None:
    checkpoint = stored(tmp_path, kind)
    found = dict(spectra(checkpoint, base))
    assert list(found) == list(checkpoint)
    for name, record in found.items():
        true = true_spectrum(checkpoint[name], weights()[name])
        values = record.singular_values
        assert record.of == "delta"
        assert record.method == ("structural" if kind == "lora" else "exact")
        torch.testing.assert_close(values, true[: len(values)], rtol=1e-9, atol=1e-7 * float(true[0]))


@pytest.mark.parametrize(("kind", "of"), [("lora", "delta"), ("dora", "update"), ("d2lora", "update"),
                                          ("duallora", "delta")])  # fmt: skip
def test_without_a_base_it_is_the_delta_where_that_needs_none(kind: str, of: str, tmp_path: Path) -> None:
    for record in dict(spectra(stored(tmp_path, kind))).values():
        assert record.of == of


def test_what_is_asked_for_is_given_or_refused(tmp_path: Path, base: BaseWeights) -> None:
    dora = stored(tmp_path, "dora")
    assert {record.of for _, record in spectra(dora, base, of="update")} == {"update"}
    assert {record.method for _, record in spectra(stored(tmp_path, "lora"), method="exact")} == {"exact"}
    for checkpoint, options in ((dora, {"of": "delta"}), (stored(tmp_path, "duallora"), {"of": "update"})):
        with pytest.raises(D2SurgeryError, match=r"USAGE model\.layers\.0\.q_proj"):
            list(spectra(checkpoint, **options))  # type: ignore[arg-type]


def test_the_order_does_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stored(tmp_path, "lora")
    calls: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr(survey, "workers", lambda: 3)
    several = list(spectra(checkpoint, progress=lambda done, total: calls.append((done, total))))
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(survey, "workers", lambda: 1)
    alone = list(spectra(checkpoint))
    assert [name for name, _ in several] == [name for name, _ in alone] == list(checkpoint)
    for (_, a), (_, b) in zip(several, alone, strict=True):
        torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-12, atol=0)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_only_what_is_asked_for_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stored(tmp_path, "lora")
    monkeypatch.setattr(survey, "workers", lambda: 1)
    read: list[str] = []
    real = checkpoint.adapter

    def counting(module: str, expert: int) -> Adapter:
        read.append(module)
        return real(module, expert)

    monkeypatch.setattr(checkpoint, "adapter", counting)
    walk = spectra(checkpoint)
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    assert len(read) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bad_module_is_named(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "workers", lambda: threads)
    broken = adapters("lora")
    next(iter(broken["model.layers.1.q_proj"].slots().values()))[0, 0] = float("nan")
    save(from_adapters(broken), tmp_path / "broken")
    walk = spectra(load(tmp_path / "broken"))
    assert next(walk)[0] == "model.layers.0.q_proj"
    with pytest.raises(D2SurgeryError, match=r"NOT_FINITE model\.layers\.1\.q_proj"):
        list(walk)
    assert torch.get_num_threads() >= 1


def test_an_adapter_that_does_not_fit_the_base_is_refused_before_work(tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", {"model.layers.0.q_proj.weight": normal(24, 15, seed=0)})
    for walk in (spectra(stored(tmp_path, "dora"), other), drifts(stored(tmp_path, "lora"), other)):
        with pytest.raises(D2SurgeryError) as error:
            next(iter(walk))
        assert {p.code for p in error.value.problems} == {"SHAPE_MISMATCH", "NO_SUCH_MODULE"}


def test_what_the_file_could_not_explain_is_not_left_out_silently(tmp_path: Path) -> None:
    save(from_adapters(adapters("lora")), tmp_path / "a")
    tensors = load(tmp_path / "a").layout.header.tensors
    kept = {key: load(tmp_path / "a").tensor(key) for key in list(tensors)[1:]}
    save_file(kept, tmp_path / "a" / "adapter_model.safetensors")
    whole = stored(tmp_path, "lora")
    for walk in (spectra(load(tmp_path / "a")), differences(load(tmp_path / "a"), whole),
                 differences(whole, load(tmp_path / "a"))):  # fmt: skip
        with pytest.raises(D2SurgeryError, match="MISSING_HALF"):
            list(walk)


# Cache -----------------------------------------------------------------------------------------------------------


def same(a: Spectrum, b: Spectrum) -> bool:
    numbers = all(getattr(a, name) == getattr(b, name) for name in (*NUMBERS, "of", "method", "error_bound"))
    return numbers and torch.equal(a.singular_values, b.singular_values) and a.quality == b.quality


@pytest.mark.parametrize("kind", ["dora", "duallora"])
def test_dense_spectra_are_computed_once_per_content(
    kind: str, tmp_path: Path, base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Adapter] = []

    def counting(adapter: Adapter, *rest: Any) -> Spectrum:
        computed.append(adapter)
        return delta_spectrum(adapter, *rest)

    monkeypatch.setattr(survey, "delta_spectrum", counting)
    cache = tmp_path / "cache"
    checkpoint = stored(tmp_path, kind)
    first = dict(spectra(checkpoint, base, cache=cache))
    assert len(computed) == len(list(cache.iterdir())) == 3
    again = dict(spectra(checkpoint, base, cache=cache))
    assert len(computed) == 3
    assert all(same(first[name], again[name]) for name in first)
    list(spectra(checkpoint, base, cache=cache, method="exact"))  # another method is another content
    assert len(computed) == 6
    changed = weights() | {"model.layers.1.q_proj": weights()["model.layers.1.q_proj"] * 2}
    other = write_base(tmp_path / "other", {f"{name}.weight": W for name, W in changed.items()})
    list(spectra(checkpoint, other, cache=cache))
    assert len(computed) == (7 if kind == "dora" else 6)  # Dual LoRA's delta does not depend on the base
    list(spectra(stored(tmp_path, kind, seed=1), base, cache=cache))
    assert len(computed) == (10 if kind == "dora" else 9)


def test_a_broken_cache_file_is_made_anew_and_an_interrupted_run_goes_on(tmp_path: Path, base: BaseWeights) -> None:
    cache = tmp_path / "cache"
    checkpoint = stored(tmp_path, "dora")
    walk = spectra(checkpoint, base, cache=cache)
    first = next(walk)
    walk.close()  # type: ignore[attr-defined]
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:-20])
    again = dict(spectra(checkpoint, base, cache=cache))
    assert same(first[1], again[first[0]])
    assert len(list(cache.iterdir())) == 3
    json.loads(file.read_text())


def test_the_scaling_and_the_axis_are_part_of_the_content() -> None:
    W = normal(6, 6, seed=0)
    digests = {
        survey._digest(adapter, W, None)
        for adapter in (make("d2lora", W), make("d2lora", W, "in_features"), make("d2lora", W, size=0.02),
                        make("projected", W))
    }  # fmt: skip
    assert len(digests) == 4
    assert survey._digest(make("dora", W), W, None) != survey._digest(make("dora", W), W.T, None)


# Drift and differences -------------------------------------------------------------------------------------------


def true_drift(adapter: Adapter, W: Tensor, dim: int) -> Any:
    before, after = W.double().numpy(), effective(adapter, W)
    return (np.sqrt((after**2).sum(dim)) / np.sqrt((before**2).sum(dim)) - 1).astype(np.float64)


def agrees(record: Drift, adapter: Adapter, W: Tensor) -> bool:
    true = true_drift(adapter, W, 1 if record.along == "out_features" else 0)
    return bool(np.linalg.norm(record.drift.numpy() - true) < 1e-6 * np.linalg.norm(true))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("along", [None, "in_features"])
def test_every_module_has_its_own_drift(kind: str, along: Any, tmp_path: Path, base: BaseWeights) -> None:
    checkpoint = stored(tmp_path, kind)
    found = dict(drifts(checkpoint, base, along=along))
    assert list(found) == list(checkpoint)
    for name, record in found.items():
        assert record.along == (along or "out_features")
        assert agrees(record, checkpoint[name], weights()[name])


def test_a_base_stored_in_out_is_measured_out_in(tmp_path: Path) -> None:
    W = normal(12, 12, seed=0).float()  # square: only the kind of model tells
    base = write_base(tmp_path / "base", {"h.0.attn.c_proj.weight": W.T.contiguous()}, model_type="gpt2")
    adapter = make("dora", W, gain=0.05)
    save(from_adapters({"transformer.h.0.attn.c_proj": adapter}), tmp_path / "adapter")
    checkpoint = load(tmp_path / "adapter")
    ((name, record),) = drifts(checkpoint, base)
    assert agrees(record, checkpoint[name], W)
    ((_, spectrum),) = spectra(checkpoint, base)
    torch.testing.assert_close(spectrum.singular_values, true_spectrum(checkpoint[name], W), rtol=1e-6, atol=1e-7)


def test_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    """A LoRA of a parameter that is fused in the model; on disk each expert has a gate and an up projection."""
    experts, half, in_ = 3, 5, 8
    names = [(e, part) for e in range(experts) for part in ("gate_proj", "up_proj")]
    tensors = {(e, part): normal(half, in_, seed=i).float() for i, (e, part) in enumerate(names)}
    base = write_base(
        tmp_path / "base", {f"model.layers.0.mlp.experts.{e}.{part}.weight": W for (e, part), W in tensors.items()}
    )
    A, B = normal(experts * 2, in_, seed=20).float(), normal(2 * half, experts * 2, seed=21).float()
    prefix = "base_model.model.model.layers.0.mlp.experts"
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [],
              "target_parameters": ["mlp.experts.gate_up_proj"], "base_model_name_or_path": "org/base",
              "peft_version": "0.21.2"}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    checkpoint = load(directory)
    assert [place.expert for place in places(checkpoint)] == [0, 1, 2]
    found = dict(drifts(checkpoint, base))
    module = next(iter(checkpoint.layout.adapters))
    for expert in range(experts):
        W = torch.cat([tensors[expert, "gate_proj"], tensors[expert, "up_proj"]])
        assert agrees(found[f"{module}[{expert}]"], checkpoint.adapter(module, expert), W)
    assert len(dict(spectra(checkpoint))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_those_of_the_modules_both_adapt(kind: str, tmp_path: Path) -> None:
    first, second = stored(tmp_path, kind), from_adapters(dict(list(adapters(kind, seed=1).items())[1:]))
    found = dict(differences(first, second))
    assert list(found) == list(second)
    for name, record in found.items():
        if kind == "duallora":
            a, b = (effective(c[name], weights()[name]) - weights()[name].double().numpy() for c in (first, second))
            assert record.in_features is record.out_features is None
        else:
            a, b = (c[name].update().dense().numpy() for c in (first, second))  # type: ignore[union-attr]
            assert record.in_features is not None
            assert record.in_features.null == pytest.approx(len(record.in_features.angles) / 16)
        norms = [float(np.sqrt((x**2).sum())) for x in (a, b)]
        assert record.norms == pytest.approx(tuple(norms), rel=1e-9)
        assert record.cosine.value == pytest.approx(float((a * b).sum()) / norms[0] / norms[1], abs=1e-9)
        assert record.signs.share == pytest.approx((np.sign(a) == np.sign(b)).mean())
    itself = dict(differences(first, first))
    assert [d.cosine.value for d in itself.values()] == pytest.approx([1] * 3)


def test_modules_of_different_shape_are_refused_by_name() -> None:
    one, other = (from_adapters({"m": make("lora", normal(*shape, seed=0))}) for shape in ((4, 6), (4, 7)))
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH m"):
        list(differences(one, other))
