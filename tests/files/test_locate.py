"""Where an adapter's files are found, and when the hub is asked."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from d2surgery.errors import D2SurgeryError
from d2surgery.files.locate import left_out, locate
from d2surgery.formats import open_layout


def code(error: pytest.ExceptionInfo[D2SurgeryError]) -> str:
    (problem,) = error.value.problems
    return problem.code


def touch(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).touch()
    return directory


FOUND = [  # (files in the directory, the weights among them)
    (["adapter_model.safetensors"], "adapter_model.safetensors"),
    (["adapter_model.bin"], "adapter_model.bin"),
    (["adapter_model.bin", "adapter_model.safetensors"], "adapter_model.safetensors"),
    (["pytorch_lora_weights.safetensors", "README.md"], "pytorch_lora_weights.safetensors"),
    (["pytorch_lora_weights.safetensors", "optimizer.bin"], "pytorch_lora_weights.safetensors"),
    (["lora.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"], "lora.bin"),
]


@pytest.mark.parametrize(("names", "weights"), FOUND)
def test_a_directory_gives_its_one_weights_file(tmp_path: Path, names: list[str], weights: str) -> None:
    assert locate(touch(tmp_path, *names))[:2] == (tmp_path / weights, None)


def test_the_config_beside_the_weights_is_theirs(tmp_path: Path) -> None:
    touch(tmp_path, "adapter_model.safetensors", "other.safetensors", "adapter_config.json")
    config = tmp_path / "adapter_config.json"
    assert locate(tmp_path) == (tmp_path / "adapter_model.safetensors", config, ())
    assert locate(str(tmp_path / "other.safetensors")) == (tmp_path / "other.safetensors", config, ())


@pytest.mark.parametrize(
    ("beside", "wanted"),
    [
        (["non_lora_trainables.bin", "new_embeddings.safetensors"], ["new_embeddings.safetensors"]),
        (["adapter_model.bin"], ["adapter_model.bin"]),
        (["optimizer.pt", "training_args.bin", "rng_state_0.pth", "scheduler.pt", "tokenizer.json"], []),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["model-*-of-00002.safetensors"]),
        (["config.json", "model.safetensors", "extra.safetensors"], ["extra.safetensors"]),
    ],
)  # fmt: skip
def test_other_weights_beside_an_adapter_are_named(tmp_path: Path, beside: list[str], wanted: list[str]) -> None:
    assert left_out(touch(tmp_path, "adapter_model.safetensors", *beside) / "adapter_model.safetensors") == wanted


def test_beside_a_file_among_others_only_usual_names_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "one.safetensors", "two.safetensors", "non_lora_trainables.bin")
    assert left_out(tmp_path / "one.safetensors") == ["non_lora_trainables.bin"]


def test_what_is_left_out_is_said_by_whoever_opens_the_adapter(adapter: Any) -> None:
    directory = touch(adapter(), "new_embeddings.safetensors")
    (problem,) = open_layout(directory).problems
    assert (problem.code, problem.severity, problem.file) == ("LEFT_OUT", "warning", "new_embeddings.safetensors")


def test_no_weights_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match="got notes, readme") as error:
        locate(touch(tmp_path, "readme", "notes"))
    assert code(error) == "NO_WEIGHTS"
    with pytest.raises(D2SurgeryError, match="an empty directory"):
        locate(touch(tmp_path / "new"))


def test_several_weights_are_listed(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match=r"a\.safetensors, b\.safetensors") as error:
        locate(touch(tmp_path, "a.safetensors", "b.safetensors"))
    assert code(error) == "SEVERAL_WEIGHTS"


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str | None]]:
    """A huggingface_hub that answers with a directory or raises; returns what it was asked."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert "adapter_config.json" in allow_patterns
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    module = ModuleType("huggingface_hub")
    vars(module).update(snapshot_download=snapshot_download, errors=SimpleNamespace(HfHubHTTPError=RuntimeError))
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [("org/name", ("org/name", None)), ("o.r-g/na_me.v1@refs/pr/1", ("o.r-g/na_me.v1", "refs/pr/1"))],
)
def test_a_hub_id_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None]
) -> None:
    hub = fake_hub(monkeypatch, touch(tmp_path / "cache", "adapter_model.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert locate(name).weights == tmp_path / "cache" / "adapter_model.safetensors"
    assert hub == [asked]


@pytest.mark.parametrize(
    "name", ["./typo", "../typo", "dir/typo.safetensors", "dir/typo.bin", "/no/such", "a/b/c", "typo"]
)
def test_a_mistyped_path_never_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = fake_hub(monkeypatch, AssertionError())
    monkeypatch.chdir(touch(tmp_path / "here"))
    with pytest.raises(D2SurgeryError) as error:
        locate(name)
    assert (code(error), hub) == ("FILE_MISSING", [])


def test_a_local_path_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fake_hub(monkeypatch, AssertionError())
    touch(touch(tmp_path / "org") / "name", "adapter_model.bin")
    monkeypatch.chdir(tmp_path)
    assert (locate("org/name").weights, hub) == (Path("org/name/adapter_model.bin"), [])


@pytest.mark.parametrize("fault", [OSError("no route\nto host"), ValueError("bad id"), RuntimeError("404"), OSError()])
def test_what_the_hub_answers_is_part_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    fake_hub(monkeypatch, fault)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(D2SurgeryError, match="org/name") as error:
        locate("org/name")
    assert code(error) == "HUB_UNREACHABLE"
    assert (str(fault).splitlines() or ["OSError"])[0] in str(error.value)
