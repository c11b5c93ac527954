"""Where a run is reported to: Trainer's own callbacks get what metrics.jsonl says, and what is amiss is said early."""

import json
from pathlib import Path
from typing import Any

import pytest
from trained import config_of, lines, write_base, write_items
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.training.config import to_toml
from d2surgery.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_items(tmp_path / "items.json")
    return tmp_path


@pytest.mark.parametrize("by", ["file", "option"])
def test_tensorboard_is_told_the_losses(folder: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    pytest.importorskip("tensorboard", reason="not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = {"report_to": ["tensorboard"]} if by == "file" else {}
    (folder / "run.toml").write_text(to_toml(config_of(folder, run=asked)))
    option = ["--report-to", "tensorboard"] if by == "option" else []
    assert main(["train", str(folder / "run.toml"), "--json", *option]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    (events,) = (folder / "out").rglob("events.out.tfevents.*")
    told = EventAccumulator(str(events.parent)).Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        found = {event.step: event.value for event in told.Scalars(tag)}
        assert found == pytest.approx({line["step"]: line[name] for line in lines(folder / "out") if name in line})


def test_reporters_that_cannot_be_used_are_all_named_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(D2SurgeryError) as error:
        train(config_of(folder, run={"report_to": ["tensorbord", "dagshub", "kubeflow"]}))
    (unknown, missing, _) = error.value.problems
    assert {problem.code for problem in error.value.problems} == {"BAD_CONFIG"}
    assert (unknown.got, "wandb" in unknown.wanted) == ("tensorbord", True)
    assert missing.message == "dagshub is not installed"
    assert not (folder / "out").exists()


class Refused(Exception):
    """What a service's own package raises."""


class Refusing(TrainerCallback):  # type: ignore[misc]
    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        raise Refused("No API key configured.\nLog in.")


def test_a_reporter_that_fails_is_named_and_the_run_can_begin_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "json", Refusing)
    monkeypatch.setattr(Refused, "__module__", "json.errors")
    with pytest.raises(D2SurgeryError, match=r"REPORTER_FAILED .*No API key configured\. \(got json\)"):
        train(config_of(folder, run={"report_to": ["json"]}))
    assert train(config_of(folder)).steps == 8, "nothing was done yet, so nothing stands in the way"
