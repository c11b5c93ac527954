"""The best of a run, its early end, and sweeps over seeds and learning rates."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trained import config_of, lines, same, write_base, write_items

from d2surgery.errors import D2SurgeryError
from d2surgery.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Held-out losses that are lowest after step 2."""
    from transformers import Trainer

    write_base(tmp_path / "base")
    write_items(tmp_path / "items.json")
    whole = Trainer.compute_loss

    def bent(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        found = whole(self, model, *args, **options)
        if model.training:
            return found
        factor = 1 + abs(self.state.global_step - 2)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    monkeypatch.setattr(Trainer, "compute_loss", bent)
    return tmp_path


EVERY = {"eval_every": 1, "save_every": 1, "keep": 9, "log_every": 1}


def test_the_best_adapter_is_the_one_that_is_saved(folder: Path) -> None:
    report = train(config_of(folder, run={**EVERY, "best": True}))
    assert (report.steps, report.best_step) == (8, 2)
    assert same(folder / "out", folder / "out" / "checkpoint-2")
    assert not same(folder / "out", folder / "out" / "checkpoint-8")
    last = train(replace(config_of(folder, run=EVERY), output=str(folder / "last")))
    assert last.best_step is None
    assert same(folder / "last", folder / "out" / "checkpoint-8")


def test_training_stops_when_it_has_waited_long_enough(folder: Path) -> None:
    config = config_of(folder, run={**EVERY, "patience": 3, "best": True})
    report = train(config)
    assert (report.steps, report.best_step) == (5, 2)
    assert [line["step"] for line in lines(folder / "out") if "eval_loss" in line] == [0, 1, 2, 3, 4, 5]
    assert same(folder / "out", folder / "out" / "checkpoint-2")
    again = train(config, resume=True)
    assert again.best_step == 2
    assert same(folder / "out", folder / "out" / "checkpoint-2")


def test_a_resumed_run_waits_as_long_as_one_that_was_not_stopped(folder: Path) -> None:
    config = config_of(folder, run={**EVERY, "patience": 3, "best": True})

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(config, progress=stop)
    report = train(config, resume=True)
    assert (report.resumed_from, report.steps, report.best_step) == (3, 5, 2)
    train(replace(config, output=str(folder / "whole")))
    assert same(folder / "out", folder / "whole")


@pytest.mark.parametrize("name", ["patience", "best"])
def test_without_held_out_items_nothing_is_best(folder: Path, name: str) -> None:
    with pytest.raises(D2SurgeryError, match=rf"BAD_CONFIG run\.{name}: nothing is held out"):
        config_of(folder, run={name: 1 if name == "patience" else True}, data={"held_out_limit": 0})


# Sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_stopped_and_chooses_a_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell is the run that `train` makes of the same settings."""
    from d2surgery.training import loop
    from d2surgery.training.sweep import sweep

    config = config_of(folder, optimizer={"steps": 2}, run={"eval_every": 2, "save_every": 1})
    whole, made = loop.train, []

    def counted(cell: Any, **options: Any) -> Any:
        made.append(cell.output)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(cell, **options)

    monkeypatch.setattr(loop, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, [1e-3, 1e-2], [0, 1])
    found = sweep(config, [1e-3, 1e-2], [0, 1])
    assert [Path(out).name for out in made] == [
        "lr0.001-seed0", "lr0.01-seed0", "lr0.001-seed1", "lr0.001-seed1", "lr0.01-seed1",
    ]  # fmt: skip
    assert {(cell["lr"], cell["seed"]) for cell in found.cells} == {(1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-2, 1)}
    losses = {lr: [cell["loss"] for cell in found.cells if cell["lr"] == lr] for lr in (1e-3, 1e-2)}
    assert found.best_lr == min(losses, key=lambda lr: sum(losses[lr]))
    with pytest.raises(D2SurgeryError, match=r"RESUME_MISMATCH.*adapter\.rank"):
        sweep(config_of(folder, adapter={"rank": 2}, optimizer={"steps": 2}, run={"eval_every": 2}), [1e-3], [0])
    rate = found.rates[0]
    mean, half = sum(losses[1e-3]) / 2, 12.706204736 * abs(losses[1e-3][0] - losses[1e-3][1]) / 2  # t(0.975, 1)
    assert rate.ci is not None
    assert (rate.mean_loss, *rate.ci) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    alone = replace(config, output=str(folder / "alone"), optimizer=replace(config.optimizer, lr=1e-2))
    train(replace(alone, run=replace(config.run, seed=1)))
    assert same(folder / "alone", folder / "out" / "lr0.01-seed1")
    assert json.loads((folder / "out" / "sweep.json").read_text())["best_lr"] == found.best_lr
