"""A disk that is full, by the kernel's own refusals: said in one way, and nothing that stood is lost."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longer import one_in
from trained import config_of, lines, same, write_base, write_items

from d2surgery.errors import D2SurgeryError
from d2surgery.files.whole import write_whole
from d2surgery.training.config import read_config
from d2surgery.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had room."""
    folder = tmp_path_factory.mktemp("disk")
    write_base(folder / "base")
    write_items(folder / "items.json")
    train(replace(config_of(folder, "d2lora"), output=str(folder / "whole")))
    return folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel ends every write there, whoever writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("last", one_in(3, ["adapter_model.safetensors", "train.toml", "optimizer.pt"]))
def test_whichever_file_does_not_fit_it_is_said_and_the_run_goes_on_from_what_is_whole(
    whole: Path, tmp_path: Path, last: str
) -> None:
    """The settings are written by Python, the adapter by Rust, the optimizer by torch's C++."""
    file = next((whole / "whole").rglob(last))
    config = replace(config_of(whole, "d2lora"), output=str(tmp_path / "out"))
    for resume in (False, True):  # and once more while there is no room yet
        with files_of_at_most(file.stat().st_size // 2), pytest.raises(D2SurgeryError) as error:
            train(config, resume=resume)
        assert [problem.code for problem in error.value.problems] == ["DISK_FULL"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".partial")]
    train(config, resume=True)
    assert same(tmp_path / "out", whole / "whole")
    assert lines(tmp_path / "out") == lines(whole / "whole")


def test_the_settings_of_a_run_survive_a_resume_that_has_no_room(whole: Path, tmp_path: Path) -> None:
    config = replace(config_of(whole, "d2lora"), output=str(tmp_path / "out"))
    train(config)
    with files_of_at_most(100), pytest.raises(D2SurgeryError, match=r"DISK_FULL .*checkpoint-8 is whole"):
        train(config, resume=True)
    assert read_config(tmp_path / "out" / "train.toml") == config
    write_whole(tmp_path / "note", "as it was")
    with files_of_at_most(4), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "note", "something else")
    assert (tmp_path / "note").read_text() == "as it was"


@pytest.mark.parametrize("file", one_in(3, ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]))
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(whole: Path, tmp_path: Path, file: str) -> None:
    """Trainer itself would go on without an optimizer's or a generator's state."""
    out = tmp_path / "out"
    config = replace(config_of(whole, "d2lora"), output=str(out))
    train(replace(config, run=replace(config.run, keep=9)))
    (out / "checkpoint-8" / file).write_bytes((out / "checkpoint-8" / file).read_bytes()[:-40])
    (out / "checkpoint-6" / file).unlink()
    for step, message in ((8, "cut short"), (6, "missing")):
        with pytest.raises(D2SurgeryError, match=rf"DAMAGED_CHECKPOINT .*checkpoint-{step}/{file}: {message}"):
            train(config, resume=True)
        shutil.rmtree(out / f"checkpoint-{step}")
    assert train(config, resume=True).resumed_from == 3
    assert same(out, whole / "whole")
    assert lines(out) == lines(whole / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_ends_of_a_disk_and_of_a_quota_are_the_same_error(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = replace(config_of(whole, "d2lora"), output=str(tmp_path / "out"))
    written, calls = torch.save, []

    def save(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(number, os.strerror(number))
        written(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(D2SurgeryError, match=r"DISK_FULL .*checkpoint-3 is whole"):
            train(config)
    assert not (tmp_path / "out" / ".partial").exists()
    assert train(config, resume=True).resumed_from == 3
    assert same(tmp_path / "out", whole / "whole")


# What lies in the way --------------------------------------------------------------------------------------------


def test_two_runs_do_not_write_to_one_output(whole: Path, tmp_path: Path) -> None:
    """The second is refused by the name of the first, whichever way it asks, and the first ends as if alone."""
    config = replace(config_of(whole, "d2lora"), output=str(tmp_path / "out"))
    told: list[str] = []

    def second(done: int, total: int) -> None:
        if done == 5:
            for resume in (False, True):
                with pytest.raises(D2SurgeryError, match=rf"OUTPUT_IN_USE .*process {os.getpid()} on ") as error:
                    train(config, resume=resume)
                told.append(str(error.value))

    train(config, progress=second)
    assert len(told) == 2
    assert same(tmp_path / "out", whole / "whole")
    assert not (tmp_path / "out/.lock").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [".partial", ".adapter_model.x.partial"])
@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_what_no_run_left_survives_and_is_named(
    whole: Path, tmp_path: Path, name: str, kind: str, resume: bool
) -> None:
    config = replace(config_of(whole, "d2lora"), output=str(tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    if kind == "link":
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    elif kind == "directory":
        shutil.copytree(tmp_path / "mine", tmp_path / "out" / name)
    else:
        (tmp_path / "out" / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(D2SurgeryError, match=rf"OUTPUT_EXISTS .*{name}.*no run left it"):
        train(config, resume=resume)
    assert sorted(tmp_path.rglob("*")) == before
    if kind == "link":
        (tmp_path / "out/train.toml").write_text("")  # nor through a link into the output of a run
        with pytest.raises(D2SurgeryError, match=rf"OUTPUT_EXISTS .*{name}"):
            train(config, resume=resume)
        assert (tmp_path / "mine/thesis.txt").read_text() == "mine"


def test_the_directory_of_the_base_is_no_output(whole: Path) -> None:
    before = sorted((whole / "base").iterdir())
    with pytest.raises(D2SurgeryError, match=r"OUTPUT_EXISTS .*the base's directory"):
        train(replace(config_of(whole, "d2lora"), output=str(whole / "base" / "..") + "/base"))
    assert sorted((whole / "base").iterdir()) == before
