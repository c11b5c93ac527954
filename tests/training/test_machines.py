"""Training on what a machine has: FSDP2, several devices, launches that are refused, precisions a device lacks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launched import TESTS, two_processes
from trained import config_of, lines, same, write_base, write_items

from d2surgery.errors import D2SurgeryError
from d2surgery.live.layers import check_device
from d2surgery.training import bases
from d2surgery.training.bases import check_packing
from d2surgery.training.config import to_toml
from d2surgery.training.loop import train
from d2surgery.training.settings import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_items(tmp_path / "items.json")
    return tmp_path


@pytest.mark.long
def test_fsdp2_trains_saves_and_resumes_as_accelerate_prepares_it(folder: Path) -> None:
    """Two processes, of which the second never holds the base, end with the loss of one, and again after a resume."""
    kinds, files = ("dora", "d2lora"), []  # those with norms of the base; test_fsdp2_spreads_adapted_models has all
    for kind in kinds:
        halves = short(folder, kind, kind, batch=2)
        (folder / f"{kind}.toml").write_text(to_toml(halves))
        files.append(str(folder / f"{kind}.toml"))
    found = [json.loads(line) for line in two_processes(str(TESTS / "prepared.py"), *files).splitlines()]
    assert [record["kind"] for record in found] == list(kinds)
    for record in found:
        kind = record["kind"]
        alone = train(short(folder, kind, f"{kind}-alone", batch=4))
        assert record["spread"]
        assert [set(devices) for devices in record["held"]] == [{"cpu"}, {"meta"}]
        assert record["eval_loss"] == pytest.approx(alone.last_eval_loss, rel=1e-4)
        assert record["resumed_from"] == 2
        assert same(folder / kind, folder / f"{kind}-again")
        assert lines(folder / kind) == lines(folder / f"{kind}-again")
        assert {file.name for file in (folder / kind / "checkpoint-4").iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth",
            "scheduler.pt", "trainer_state.json",
        }, "no base in a checkpoint"  # fmt: skip


def named(config: TrainConfig, output: str) -> TrainConfig:
    return replace(config, output=str(Path(config.output).with_name(output)))


def short(folder: Path, kind: str, output: str, *, batch: int) -> TrainConfig:
    optimizer, run = {"batch": batch, "steps": 4}, {"save_every": 2, "eval_every": 4}
    return named(config_of(folder, kind, optimizer=optimizer, run=run), output)


def test_one_process_trains_on_one_device_and_says_how_many_are_idle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four devices Trainer would take four times the rows and spread the model by DataParallel."""
    from transformers import TrainingArguments

    train(config_of(folder, "dora"))

    whole: Any = TrainingArguments.__dict__["_setup_devices"].func

    def setup(arguments: Any) -> Any:
        device = whole(arguments)
        arguments._n_gpu = 4
        return device

    devices = cached_property(setup)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    plans: list[Any] = []
    auto = named(config_of(folder, "dora", run={"device": "auto"}), "four")
    train(auto, announce=plans.append)
    assert same(folder / "out", folder / "four")
    (problem,) = plans[0].problems
    assert (problem.code, problem.wanted) == ("IDLE_DEVICES", "torchrun --nproc-per-node 4 -m d2surgery train …")
    assert "3 more are idle" in problem.message


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
     ("PARALLELISM_CONFIG_TP_SIZE", "2", "tensor parallelism")],
)  # fmt: skip
def test_other_launches_of_accelerate_are_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(D2SurgeryError, match=f"BAD_CONFIG accelerate: {name} was not tested"):
        train(config_of(folder))
    assert not (folder / "out").exists()


def test_bf16_on_a_machine_without_an_accelerator_is_trained_on_its_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "accelerator", lambda: None)
    report = train(config_of(folder, run={"device": "auto", "precision": "bf16"}))
    assert report.steps == 8


def test_apples_device_without_float64_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "accelerator", lambda: torch.device("mps"))
    train(config_of(folder, run={"device": "auto"}))
    with pytest.raises(D2SurgeryError, match="NO_DOUBLE_PRECISION"):
        check_device(torch.device("mps"))


def test_compiling_does_not_turn_tf32_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.training_args as module
    from models import byte_tokenizer

    from d2surgery.training.data import read_corpus
    from d2surgery.training.loop import _arguments
    from d2surgery.training.planning import schedule_of

    asked: list[bool] = []
    monkeypatch.setattr(module, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(module, "enable_tf32", asked.append)
    config = config_of(folder, run={"compile": True})
    schedule = schedule_of(config, read_corpus(config.data, byte_tokenizer(), 0))
    _arguments(config, schedule, evaluates=True, fresh=True)
    assert asked[-1] is False


def test_the_look_at_packed_rows_is_on_the_models_device() -> None:
    seen: list[torch.device] = []

    class Model:
        device = torch.device("cpu", 0)  # not where torch puts tensors by itself

        def eval(self) -> None: ...

        def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            seen.extend((input_ids.device, position_ids.device))
            return SimpleNamespace(logits=torch.zeros(1, 6, 2))

    check_packing(Model())
    assert {str(device) for device in seen} <= {"cpu", "cpu:0"}
    assert len(seen) == 4


def test_fp16_is_refused_with_dual_loras_clip_alone(folder: Path) -> None:
    """The scaler's factor would be on the gradients that are clipped at 1."""
    half = {"precision": "fp16"}
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG adapter\.ste: .*scaler") as error:
        config_of(folder, "duallora", run=half)
    assert len(error.value.problems) == 1
    config_of(folder, "duallora", run=half, adapter={"ste": "mask"})
    config_of(folder, "dora", run=half)


def test_a_loss_of_any_micro_batch_that_is_no_number_is_told_with_its_items(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at once for each step, and still before the optimizer takes it."""
    from transformers import Trainer

    whole, calls = Trainer.compute_loss, [0]

    def spoilt(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return whole(*args, **options) * (float("nan") if calls[0] == 5 else 1)

    monkeypatch.setattr(Trainer, "compute_loss", spoilt)
    config = config_of(folder, optimizer={"batch": 2, "accumulation": 4}, run={"save_every": 1})
    with pytest.raises(
        D2SurgeryError, match=r"LOSS_NOT_FINITE: step 2, on items\.json, item \d+; items\.json, item \d+ "
    ):
        train(replace(config, data=replace(config.data, held_out_limit=0)))
    assert calls == [8]
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_is_computed_as_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from transformers import AutoModelForCausalLM

    whole, chosen = AutoModelForCausalLM.from_pretrained, []

    def loaded(*args: Any, **options: Any) -> Any:
        model = whole(*args, **options)
        chosen.append(model.config._attn_implementation)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    train(config_of(folder, run={"attention": name}, optimizer={"steps": 1}))
    assert chosen == [name]


# Dual LoRA -------------------------------------------------------------------------------------------------------


def test_a_far_start_is_told_with_its_number_and_the_default_is_near(folder: Path) -> None:
    """‖delta‖/‖W0‖ at w = 1, measured here on the dense delta."""
    from transformers import AutoModelForCausalLM

    from d2surgery.live.attaching import initial

    plans: list[Any] = []
    train(config_of(folder, "duallora"), announce=plans.append)
    far = named(config_of(folder, "duallora", adapter={"sigma": 0.05}), "far")
    train(far, announce=plans.append)
    assert plans[0].problems == ()
    (problem,) = plans[1].problems
    assert problem.code == "START_MOVES_BASE"
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    shares = []
    for sigma in (None, 0.05):
        start = initial(model, "duallora", "all-linear", rank=2, scaling=2.0, sigma=sigma)
        ratios = [
            float(
                adapter.delta(model.get_submodule(name).weight.detach()).norm()
                / model.get_submodule(name).weight.norm().detach()
            )
            for name, adapter in start.items()
        ]
        shares.append(sorted(ratios)[len(ratios) // 2])
    assert shares[0] == pytest.approx(0.01, rel=0.2)
    said = float(problem.message.rpartition(" by ")[2].removesuffix(" %")) / 100
    assert said == pytest.approx(shares[1], rel=0.2)


def test_a_checkpoint_in_mid_warm_up_records_the_factor(folder: Path) -> None:
    from d2surgery import load

    train(config_of(folder, "duallora", adapter={"scaling_warmup": 4}, run={"keep": 9, "save_every": 2}))
    found = {step: load(folder / "out" / f"checkpoint-{step}").layout.about.training for step in (2, 4, 8)}
    assert found[2]["warmup"] == 0.5
    assert "warmup" not in found[4] | found[8] | load(folder / "out").layout.about.training


@pytest.mark.parametrize("ste", ["clip", "mask", "identity"])
def test_what_the_sign_changes_of_gradients_is_logged(folder: Path, ste: str) -> None:
    large = {"sigma": 3.0} if ste == "mask" else {}
    config = config_of(folder, "duallora", adapter={"ste": ste, "scaling_warmup": 0, **large}, run={"log_every": 1})
    train(config)
    shares = [line["clipped"] for line in lines(folder / "out") if "loss" in line]
    assert len(shares) == 8
    assert all(share > 0.5 for share in shares) if ste == "mask" else set(shares) == {0.0}
    train(named(config_of(folder, "lora"), "lora"))
    assert not any("clipped" in line for line in lines(folder / "lora"))
