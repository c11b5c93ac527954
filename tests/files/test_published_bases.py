"""Bases as people publish them: torch.save's files, whole or in shards, variants beside each other, hub ids."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import BaseWeights, D2SurgeryError, LoRA, from_adapters, merge, save

Q = "model.layers.0.self_attn.q_proj"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """safe/, the base by transformers; a/, an adapter; out/, their merge."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    llama(tied=True).bfloat16().save_pretrained(folder / "safe")
    out, in_ = load_file(folder / "safe/model.safetensors")[f"{Q}.weight"].shape
    save(from_adapters({Q: LoRA(A=normal(2, in_), B=normal(out, 2), scaling=0.1)}), folder / "a")
    merge(folder / "safe", folder / "a", folder / "out")
    return folder


def directory(target: Path, inputs: Path) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((inputs / "safe/config.json").read_bytes())
    return target


def state(inputs: Path) -> dict[str, Tensor]:
    """A state_dict with the tied output in it, and buffers that no safetensors file has."""
    tensors: dict[str, Tensor] = load_file(inputs / "safe/model.safetensors")
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def sharded(target: Path, tensors: dict[str, Tensor]) -> None:
    files = {name: f"pytorch_model-0000{1 + at % 2}-of-00002.bin" for at, name in enumerate(tensors)}
    files["lm_head.weight"] = files["model.embed_tokens.weight"]  # as transformers cuts them
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files | {}}))


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_what_torch_saved_is_merged_to_the_same_file(inputs: Path, tmp_path: Path) -> None:
    torch.save(state(inputs), directory(tmp_path / "bin", inputs) / "pytorch_model.bin")
    merge(tmp_path / "bin", inputs / "a", tmp_path / "out")
    assert {n: t.dtype for n, t in load_file(tmp_path / "out/model.safetensors").items()} == {
        n: t.dtype for n, t in load_file(inputs / "out/model.safetensors").items()
    }
    found, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(inputs / "out/model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_shards_of_torch_too(inputs: Path, tmp_path: Path) -> None:
    sharded(directory(tmp_path / "bin", inputs), state(inputs))
    found, wanted = BaseWeights(tmp_path / "bin"), BaseWeights(inputs / "safe")
    assert found.header.tensors.keys() == wanted.header.tensors.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(found.rows(f"{Q}.weight", 3, 7), wanted.rows(f"{Q}.weight", 3, 7))


def test_views_share_the_bytes_of_what_they_are_of(inputs: Path, tmp_path: Path) -> None:
    whole = normal(6, 4)
    tensors = {"whole": whole, "rows": whole[2:5], "again": whole, "none": torch.empty(0, 4), "one": torch.tensor(7)}
    torch.save(tensors, directory(tmp_path / "bin", inputs) / "pytorch_model.bin")
    found = BaseWeights(tmp_path / "bin")
    assert sorted(found) == ["none", "one", "rows", "whole"]
    assert all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize("fault", ["legacy", "strided"])
def test_what_does_not_lie_in_one_piece_is_refused(inputs: Path, tmp_path: Path, fault: str) -> None:
    tensors = {"w": normal(6, 4) if fault == "legacy" else normal(4, 6).T}
    target = directory(tmp_path / "bin", inputs) / "pytorch_model.bin"
    torch.save(tensors, target, _use_new_zipfile_serialization=fault != "legacy")
    with pytest.raises(D2SurgeryError) as error:
        BaseWeights(tmp_path / "bin")
    assert [problem.code for problem in error.value.problems] == ["PICKLE"]


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "other"])
def test_of_variants_the_one_without_is_taken(inputs: Path, tmp_path: Path, stem: str) -> None:
    target = directory(tmp_path / "base", inputs)
    tensors = load_file(inputs / "safe/model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, target / f"{stem}.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, target / f"{stem}.fp16.safetensors")
    assert BaseWeights(target).header.usual_dtype == "F32"
    (target / f"{stem}.safetensors").unlink()
    assert BaseWeights(target).header.usual_dtype == "F16", "the only one there is"


def test_safetensors_win_over_what_torch_saved(inputs: Path, tmp_path: Path) -> None:
    target = directory(tmp_path / "base", inputs)
    save_file(load_file(inputs / "safe/model.safetensors"), target / "model.safetensors")
    (target / "pytorch_model.bin").write_bytes(b"not looked at")
    assert BaseWeights(target).header.files == (target / "model.safetensors",)


def test_a_hub_id_is_a_base(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert {"*.safetensors", "*.json"} <= set(allow_patterns)
        return str(inputs / "safe")

    module = ModuleType("huggingface_hub")
    vars(module).update(snapshot_download=snapshot_download, errors=SimpleNamespace(HfHubHTTPError=RuntimeError))
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    merge("org/base@main", inputs / "a", tmp_path / "out")
    assert asked == [("org/base", "main")]
    assert same_weights(tmp_path / "out", inputs / "out")
