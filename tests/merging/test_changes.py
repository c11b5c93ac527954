"""Files that change while they are merged: never a merge of two, whatever changed when and in which way."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import d2surgery.merging.prepared
from d2surgery import BaseWeights, LoRA, from_adapters, load, merge, plan, save
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.files.header import TensorInfo
from d2surgery.merging.ahead import HashAhead

SHARD = 4000


class Scene(NamedTuple):
    base: Path
    adapter: Path
    other: Path  # of the same shapes and sizes, other numbers


def write_base(directory: Path, seed: int) -> None:
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for part in range(2):
        names = [f"layers.{i}.proj.weight" for i in range(part * 2, part * 2 + 2)]
        tensors = {name: torch.randn(40, 24, generator=generator).bfloat16() for name in names}
        save_file(tensors, directory / f"model-{part}.safetensors")
    weight_map = {f"layers.{i}.proj.weight": f"model-{i // 2}.safetensors" for i in range(4)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "x", "seed": seed}))
    (directory / "tokenizer.json").write_text(json.dumps({"seed": seed}))


def write_adapter(directory: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapters = {
        f"layers.{i}.proj": LoRA(
            A=torch.randn(2, 24, generator=generator), B=torch.randn(40, 2, generator=generator), scaling=seed * 0.5
        )
        for i in range(4)
    }
    save(from_adapters(adapters), directory)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    for name, seed in (("", 1), ("other", 2)):
        write_base(tmp_path / name / "base", seed)
        write_adapter(tmp_path / name / "adapter", seed)
        (tmp_path / name / "adapter/chat_template.jinja").write_text(f"{{{{ {seed} }}}}")
    return Scene(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")


def keep_times(file: Path, change: Callable[[], Any]) -> None:
    found = file.stat()
    change()
    if file.exists():
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def renamed_over(file: Path, other: Path) -> None:
    shutil.copy(other, file.with_name("new"))
    file.with_name("new").replace(file)


def behind_a_link(file: Path, other: Path) -> None:
    """As in the hub's cache."""
    file.unlink()
    file.symlink_to(other)


def one_byte(file: Path, other: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"~")


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "written in place": lambda file, other: file.write_bytes(other.read_bytes()),
    "one byte in place": one_byte,
    "renamed over": renamed_over,
    "link": behind_a_link,
    "deleted": lambda file, other: file.unlink(),
    "cut": lambda file, other: os.truncate(file, 10),
    "emptied": lambda file, other: file.write_bytes(b""),
}
FILES = {
    "base/model-1.safetensors": "BASE_CHANGED",
    "base/model.safetensors.index.json": "BASE_CHANGED",
    "base/config.json": "BASE_CHANGED",
    "adapter/adapter_model.safetensors": "ADAPTER_CHANGED",
    "adapter/adapter_config.json": "ADAPTER_CHANGED",
    "base/tokenizer.json": "COMPANION_CHANGED",
    "adapter/chat_template.jinja": "COMPANION_CHANGED",
}


def refused(run: Callable[[], Any], file: Path, *wanted: str) -> None:
    with pytest.raises((D2SurgeryError, FileNotFoundError)) as error:
        run()
    if isinstance(error.value, D2SurgeryError):
        assert {problem.code for problem in error.value.problems} <= set(wanted), error.value
    assert file.name in str(error.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_changes_while_it_is_merged_ends_the_merge(
    scene: Scene, tmp_path: Path, name: str, way: str
) -> None:
    """With the time of its last change put back. Nothing stands at the output."""
    file, times = tmp_path / name, iter(range(1000))

    def change(done: int, total: int) -> None:
        if next(times) == 1:
            keep_times(file, lambda: WAYS[way](file, scene.other / name))

    def run() -> None:
        merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD, progress=change)

    refused(run, file, FILES[name], "TRUNCATED_FILE")
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / ".out.partial/journal.jsonl").read_text()
    assert (
        len([line for line in journal.splitlines() if line.startswith('{"file"')]) <= 1
        or "chat" in name
        or ("tokenizer" in name)
    ), "no shard of changed files counts as finished"


@pytest.mark.parametrize("moment", ["before hashing", "after hashing"])
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_changes_between_looking_and_hashing_and_reading_is_refused(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, way: str
) -> None:
    file = scene.adapter / "adapter_model.safetensors"
    check = d2surgery.merging.prepared.Prepared.check_adapter

    def checked(prepared: Any, *, hashes: bool) -> Any:
        if moment == "before hashing":
            WAYS[way](file, scene.other / "adapter/adapter_model.safetensors")
        found = check(prepared, hashes=hashes)
        if moment == "after hashing":
            WAYS[way](file, scene.other / "adapter/adapter_model.safetensors")
        return found

    monkeypatch.setattr(d2surgery.merging.prepared.Prepared, "check_adapter", checked)
    refused(lambda: merge(scene.base, scene.adapter, tmp_path / "out"), file, "ADAPTER_CHANGED", "TRUNCATED_FILE")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "base/model-0.safetensors"])
def test_a_plan_of_what_changes_meanwhile_is_none(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check = d2surgery.merging.prepared.Prepared.check_adapter

    def checked(prepared: Any, *, hashes: bool) -> Any:
        renamed_over(tmp_path / name, scene.other / name)
        return check(prepared, hashes=hashes)

    monkeypatch.setattr(d2surgery.merging.prepared.Prepared, "check_adapter", checked)
    refused(lambda: plan(scene.base, scene.adapter, tmp_path / "out"), tmp_path / name, FILES.get(name, "BASE_CHANGED"))


@pytest.mark.parametrize("way", ["written in place", "renamed over"])
def test_a_base_that_changed_after_a_kill_is_another_merge(scene: Scene, tmp_path: Path, way: str) -> None:
    """Size and time of the last change as before: half of the shards would be of the old one."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD, progress=stop)
    file = scene.base / "model-1.safetensors"
    keep_times(file, lambda: WAYS[way](file, scene.other / "base/model-1.safetensors"))
    with pytest.raises(D2SurgeryError, match=r"RESUME_MISMATCH.*these differ: files"):
        merge(scene.base, scene.adapter, tmp_path / "out", shard_size=SHARD, resume=True)


def test_what_is_hashed_ahead_is_what_is_held(scene: Scene) -> None:
    """By a process of its own, which is given the descriptors and not the names."""
    tensors = BaseWeights(scene.base).header.tensors
    first = hashed(tensors)
    assert first.keys() == tensors.keys()
    for part in range(2):
        renamed_over(scene.base / f"model-{part}.safetensors", scene.other / f"base/model-{part}.safetensors")
    assert hashed(tensors) == first
    assert hashed(BaseWeights(scene.base).header.tensors) != first


def hashed(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    ahead = HashAhead(tensors)
    assert ahead._process is not None
    ahead._process.wait()
    return ahead.stop()


def test_what_was_opened_is_read_whatever_takes_its_name(scene: Scene) -> None:
    base, adapter = BaseWeights(scene.base), load(scene.adapter)
    weights, values = dict(base), {module: adapter[module].slots() for module in adapter}
    for name in FILES:
        renamed_over(scene.base.parent / name, scene.other / name)
    assert all(torch.equal(base[name], weights[name]) for name in weights)
    assert all(torch.equal(adapter[m].slots()[s], t) for m, slots in values.items() for s, t in slots.items())


def test_the_command_line_ends_with_2_and_names_the_file(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = d2surgery.merging.prepared.Prepared.check_adapter
    file = scene.base / "model-0.safetensors"

    def checked(prepared: Any, *, hashes: bool) -> Any:
        renamed_over(file, scene.other / "base/model-0.safetensors")
        return check(prepared, hashes=hashes)

    monkeypatch.setattr(d2surgery.merging.prepared.Prepared, "check_adapter", checked)
    out = str(tmp_path / "out")
    assert main(["merge", "--base", str(scene.base), "--adapter", str(scene.adapter), "--out", out]) == 2
    said = capsys.readouterr()
    assert said.err.count("BASE_CHANGED") == 1
    assert str(file) in said.err
    assert said.out == ""
