"""Training: what is learnt, and that neither a kill nor a NaN loses it (a full disk: test_training_disk.py)."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trained as T
from launched import TESTS, two_processes
from longer import one_in
from models import byte_tokenizer
from trained import config_of, lines, same, tensors, write_base, write_items
from transformers import AutoModelForCausalLM

from d2surgery import KINDS, load
from d2surgery.errors import D2SurgeryError
from d2surgery.live.attaching import adapted, attach
from d2surgery.training.config import to_toml
from d2surgery.training.data import read_corpus
from d2surgery.training.loop import train
from d2surgery.training.settings import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over two threads need not have the bits of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    write_items(folder / "items.json")
    return folder


@pytest.fixture
def folder(material: Path, tmp_path: Path) -> Path:
    for name in ("base", "items.json"):
        (tmp_path / name).symlink_to(material / name)
    return tmp_path


def to(config: TrainConfig, output: str) -> TrainConfig:
    return replace(config, output=str(Path(config.output).with_name(output)))


def killed(run: Callable[..., None], *arguments: Any) -> None:
    """Run it in a process of its own and see it die of SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trained", "d2surgery.training.trainer"])
    process = context.Process(target=run, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def codes(error: pytest.ExceptionInfo[D2SurgeryError]) -> set[str]:
    return {problem.code for problem in error.value.problems}


# What is learnt --------------------------------------------------------------------------------------------------


@every_kind
def test_the_loss_falls_and_the_file_is_what_was_trained(folder: Path, kind: str) -> None:
    """The held-out loss of the base with the loaded file, computed here, is the last one that training saw."""
    config = config_of(folder, kind, optimizer={"steps": 24}, run={"eval_every": 24})
    report = train(config)
    assert report.first_eval_loss is not None
    assert report.last_eval_loss is not None
    assert report.last_eval_loss < report.first_eval_loss - 0.05
    assert [line for line in lines(config.output) if "eval_loss" in line] == [
        {"step": 0, "eval_loss": report.first_eval_loss},
        {"step": 24, "eval_loss": report.last_eval_loss},
    ]
    stored = load(config.output)
    assert {adapter.scaling for adapter in stored.values()} == {config.scaling}
    assert stored.layout.base_model == config.base
    model = AutoModelForCausalLM.from_pretrained(config.base).eval()
    assert held_out_loss(config, model) == pytest.approx(report.first_eval_loss, rel=1e-6)
    attach(model, stored)
    assert held_out_loss(config, model) == pytest.approx(report.last_eval_loss, rel=1e-6)


@torch.no_grad()
def held_out_loss(config: TrainConfig, model: Any) -> float:
    """Item by item, by the model's own loss; Trainer's mean is over batches of the mean over their tokens."""
    items = read_corpus(config.data, byte_tokenizer(), config.run.seed).held_out
    sums = []
    for item in items:
        tokens = torch.tensor([item.tokens])
        labels = tokens.clone()
        labels[0, : -item.answer] = -100
        sums.append((float(model(tokens, labels=labels).loss) * item.answer, item.answer))
    batches = [sums[at : at + 4] for at in range(0, len(sums), 4)]
    means = [sum(total for total, _ in batch) / sum(count for _, count in batch) for batch in batches]
    return sum(means) / len(means)


def test_what_is_printed_is_told_in_the_plan(folder: Path) -> None:
    plans: list[Any] = []
    done: list[tuple[int, int]] = []
    config = config_of(folder, "d2lora", adapter={"targets": ["q_proj"]}, data={"max_length": 16})
    report = train(config, announce=plans.append, progress=lambda *at: done.append(at))
    (plan,) = plans
    assert (plan.modules, plan.ranks, plan.scaling) == (2, (2, 2), 2.0)
    assert plan.targets == {"model.layers.*.self_attn": ("q_proj",)}
    assert plan.trainable_parameters == 2 * 2 * 2 * (16 + 16)
    assert (plan.items, plan.held_out, plan.rows, plan.steps, plan.rows_per_step) == (32, 8, 32, 8, 4)
    assert plan.tokens == report.tokens == lines(config.output)[-2]["tokens"] == 32 * 16
    assert [problem.code for problem in plan.problems] == ["ITEMS_TOO_LONG"]
    short = sum(len(f"<is {n} even?\n{'odd' if n % 2 else 'even'}>") <= 16 for n in range(40))
    assert f"{40 - short} questions lost their beginning" in plan.problems[0].message
    assert done == [(n, 8) for n in range(1, 9)]


def test_only_slots_are_trained(folder: Path) -> None:
    config = config_of(folder, "dora", adapter={"targets": ["q_proj", "down_proj"]})
    train(config)
    names = {key.split(".")[-2] if key.endswith(".weight") else key.split(".")[-1] for key in tensors(config.output)}
    assert names == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {file.name for file in (folder / "out" / "checkpoint-8").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json",
    }  # fmt: skip


def test_peft_loads_what_is_its_own_and_it_computes_the_same(folder: Path) -> None:
    from peft import PeftModel

    config = config_of(folder, "dora", adapter={"rslora": True})
    train(config)
    tokens = torch.arange(40, 60)[None]
    ours = AutoModelForCausalLM.from_pretrained(config.base).eval()
    attach(ours, load(config.output))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.base), config.output).eval()
    assert theirs.peft_config["default"].use_rslora
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-5, atol=1e-6)


def test_how_it_was_trained_stands_in_our_own_kinds_files(folder: Path) -> None:
    config = config_of(folder, "d2lora", adapter={"detach_norm": True, "sigma": 0.1, "along": "out_features"})
    train(config)
    found = load(config.output).layout
    assert found.problems == ()
    assert found.about.training == {
        "detach_norm": True,
        "detach_minus": False,
        "sigma": 0.1,
        "dropout": 0.0,
        "seed": 0,
        "steps": 8,
    }
    assert {entry.settings["along"] for entry in found.adapters.values()} == {"out_features"}


def test_a_detached_minus_branch_trains_the_plus_branch_as_without_it(folder: Path) -> None:
    """Of the paper's two ablations one is the other, from B₋ = 0: the same plus branch, bit for bit."""
    plans: list[Any] = []
    arms: dict[str, dict[str, Any]] = {"detached": {"detach_minus": True}, "off": {"tau": 0.0}, "both": {}}
    for name, chosen in arms.items():
        config = config_of(folder, "d2lora", adapter=chosen)
        train(replace(config, output=str(folder / name)), announce=plans.append)
    detached, off, both = (tensors(folder / name) for name in ("detached", "off", "both"))
    for name, slot in detached.items():
        if "_plus" in name:
            assert torch.equal(slot, off[name])
            assert not torch.equal(slot, both[name])
        elif "B_minus" in name:
            assert not slot.any()
            assert both[name].any()
    assert [2 * plans[0].trainable_parameters, 4.0] == [plans[2].trainable_parameters, plans[0].effective_scaling]
    with pytest.raises(D2SurgeryError, match=r"lr_ratio\.B_minus: it does not learn .wanted A_plus or B_plus"):
        config_of(folder, "d2lora", adapter={"detach_minus": True}, optimizer={"lr_ratio": {"B_minus": 2.0}})


# Learning rates, warm-up, accumulation ---------------------------------------------------------------------------


def test_each_slot_has_its_learning_rate(folder: Path) -> None:
    """The first step of AdamW moves an entry by lr·g/(|g| + 1e-8), so that the largest move is the learning rate."""
    rates = {"B": 16.0, "magnitude": 0.25}
    train(config_of(folder, "dora", optimizer={"steps": 1, "lr": 1e-3, "lr_ratio": rates, "max_grad_norm": 0.0}))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for module, adapter in load(folder / "out").items():
        norms = model.get_submodule(module).weight.detach().norm(dim=1)
        assert float(adapter.slots()["B"].abs().max()) == pytest.approx(16e-3, rel=1e-3), module
        moved = float((adapter.slots()["magnitude"] - norms).abs().max())
        assert moved == pytest.approx(0.25e-3, rel=2e-2), module  # a norm near 1 in float32, and its own rounding


def test_a_magnitude_does_not_decay(folder: Path) -> None:
    """With a learning rate of 1e-30 nothing but decay could move a value; 1 − lr·decay is then 0.9."""
    decay = {"lr": 1e-30, "weight_decay": 1e29, "steps": 1}
    train(config_of(folder, "dora", optimizer=decay))
    plain = config_of(folder, "dora", optimizer={**decay, "weight_decay": 0.0})
    train(to(plain, "plain"))
    for name, tensor in tensors(folder / "plain").items():
        factor = 1.0 if name.endswith("magnitude_vector") else 0.9
        torch.testing.assert_close(tensors(folder / "out")[name], factor * tensor, rtol=1e-6, atol=1e-12)


def test_dual_loras_scaling_rises_and_ends_in_the_file(folder: Path) -> None:
    """w(t) = t/4: a checkpoint holds the scaling of its own step, the adapter the whole; at w = 0 nothing moves."""
    config = config_of(folder, "duallora", adapter={"scaling_warmup": 4}, run={"keep": 9, "save_every": 2})
    train(config)
    for step, w in ((2, 0.5), (4, 1.0), (8, 1.0)):
        found = load(folder / "out" / f"checkpoint-{step}")
        assert {adapter.scaling for adapter in found.values()} == {config.scaling * w}
    assert lines(config.output)[1] == {
        "step": 1, "epoch": 0.125, "loss": lines(config.output)[1]["loss"], "lr": 0.01, "grad_norm": 0.0,
        "clipped": 0.0, "tokens": lines(config.output)[1]["tokens"],
    }  # fmt: skip
    assert lines(config.output)[0]["eval_loss"] == pytest.approx(
        held_out_loss(config, AutoModelForCausalLM.from_pretrained(config.base).eval()), rel=1e-6
    ), "the delta is zero at the start"


@pytest.mark.parametrize("batching", ["shuffled", "by_length"])
def test_accumulated_gradients_are_those_of_the_large_batch(folder: Path, batching: str) -> None:
    """Rows of unequal answers, so that means over micro-batches would differ by per cents. Float32 sums in another
    order differ by 1e-6 of the loss, and AdamW does not enlarge that over eight steps beyond 1e-5."""
    items = [{"question": f"q{n}", "answer": "a" * (1 + 7 * (n % 3))} for n in range(32)]
    (folder / "uneven.json").write_text(json.dumps(items))
    data = {"train": [str(folder / "uneven.json")], "batching": batching}
    train(config_of(folder, "lora", data=data))
    halves = config_of(folder, "lora", data=data, optimizer={"batch": 2, "accumulation": 2})
    train(to(halves, "halves"))
    whole, split = ([line["loss"] for line in lines(folder / name) if "loss" in line] for name in ("out", "halves"))
    assert split == pytest.approx(whole, rel=1e-5)


def test_packed_rows_and_mixed_precision_and_recomputed_activations_learn_too(folder: Path) -> None:
    packed = config_of(folder, "d2lora", data={"batching": "packed"}, optimizer={"steps": 16, "batch": 2})
    for name, run in (("packed", {}), ("bf16", {"precision": "bf16"}), ("memory", {"gradient_checkpointing": True})):
        report = train(to(replace(packed, run=replace(packed.run, **run)), name))
        assert report.first_eval_loss is not None
        assert report.last_eval_loss is not None
        assert report.last_eval_loss < report.first_eval_loss - 0.02, name
    assert same(folder / "packed", folder / "memory"), "recomputing changes no bit"
    assert all(tensor.dtype == torch.float32 for tensor in tensors(folder / "bf16").values())


# Interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", one_in(2, KINDS))
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_adapter(folder: Path, kind: str) -> None:
    """Bit for bit, with dropout, and with the same metrics; killed in the middle of steps and of a checkpoint."""
    config = config_of(folder, kind, adapter={"dropout": 0.1}, optimizer={"accumulation": 2, "batch": 2})
    train(to(config, "whole"))
    killed(T.die_after_step, config, 5)
    assert not (folder / "out" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-3"]
    assert lines(folder / "out")[-2]["step"] == 4, "a line that the resumed run writes again"
    report = train(config, resume=True)
    assert report.resumed_from == 3
    assert same(folder / "out", folder / "whole")
    assert lines(folder / "out") == lines(folder / "whole")


@pytest.mark.parametrize("batching", ["packed", "by_length"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(folder: Path, batching: str) -> None:
    config = config_of(folder, "duallora", data={"batching": batching})
    train(to(config, "whole"))
    killed(T.die_in_checkpoint, config, 6)
    assert (folder / "out" / ".partial" / "checkpoint-6" / "optimizer.pt").exists()
    assert not (folder / "out" / "checkpoint-6").exists()
    assert train(config, resume=True).resumed_from == 3
    assert same(folder / "out", folder / "whole")
    assert lines(folder / "out") == lines(folder / "whole")
    assert not (folder / "out" / ".partial").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again(folder: Path) -> None:
    config = config_of(folder, "lora")
    train(to(config, "whole"))
    killed(T.die_after_step, config, 1)
    report = train(config, resume=True)
    assert report.resumed_from is None
    assert same(folder / "out", folder / "whole")
    assert lines(folder / "out") == lines(folder / "whole")


@pytest.mark.parametrize("number", one_in(2, [signal.SIGINT, signal.SIGTERM]))
def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(folder: Path, number: signal.Signals) -> None:
    config = config_of(folder, "d2lora", adapter={"dropout": 0.1})
    train(to(config, "whole"))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4; --resume"):
        train(config, progress=lambda done, total: os.kill(os.getpid(), number) if done == 3 else None)
    assert signal.getsignal(number) is before
    assert train(config, resume=True).resumed_from == 4
    assert same(folder / "out", folder / "whole")


def test_a_finished_run_resumed_is_the_same_run(folder: Path) -> None:
    config = config_of(folder, "lora")
    first = train(config)
    metrics = lines(config.output)
    (folder / "out").rename(folder / "before")
    shutil.copytree(folder / "before", folder / "out")
    again = train(config, resume=True)
    assert again == replace(first, resumed_from=8, seconds_per_step=None)
    assert same(folder / "out", folder / "before")
    assert lines(config.output) == metrics


def test_a_seed_is_a_run(folder: Path) -> None:
    """The same seed the same bits; another seed other items, other values."""
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(to(config_of(folder, "duallora", adapter={"dropout": 0.1}, run={"seed": seed}), name))
    assert same(folder / "one", folder / "two")
    assert not same(folder / "one", folder / "other")
    assert lines(folder / "one") == lines(folder / "two")
    assert lines(folder / "one")[0] != lines(folder / "other")[0]


def test_a_resumed_run_must_be_the_run_that_began(folder: Path) -> None:
    config = config_of(folder, "lora")
    train(config)
    for changed in ({"lr": 0.02}, {"steps": 10}):
        with pytest.raises(D2SurgeryError) as error:
            train(config_of(folder, "lora", optimizer=changed), resume=True)
        (problem,) = error.value.problems
        assert (problem.code, problem.module) == ("RESUME_MISMATCH", f"optimizer.{next(iter(changed))}")
    train(config_of(folder, "lora", run={"save_every": 5, "keep": 1}), resume=True)


def test_a_resumed_run_must_have_the_items_and_processes_it_began_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, "lora")
    train(config)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(D2SurgeryError, match=r"RESUME_MISMATCH .*rows_per_step.*wanted 4; got 8"):
            train(config, resume=True)
    (folder / "items.json").unlink()
    write_items(folder / "items.json", start=1)
    with pytest.raises(D2SurgeryError, match=r"RESUME_MISMATCH .*data_sha256"):
        train(config, resume=True)


# What goes wrong -------------------------------------------------------------------------------------------------


def test_an_output_that_holds_a_run_is_refused(folder: Path) -> None:
    config = config_of(folder, "lora")
    train(config)
    before = same_files(folder / "out")
    with pytest.raises(D2SurgeryError, match="OUTPUT_EXISTS"):
        train(config)
    (folder / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(D2SurgeryError, match=r"OUTPUT_EXISTS .*checkpoint-6"):
        train(config)
    assert before.items() >= same_files(folder / "out").items()


def same_files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in one trained tensor after step 4: step 5 has no loss, and says on which items."""
    config = config_of(folder, "lora")

    def spoil(done: int, total: int) -> None:
        if done == 4:
            next(iter(adapted(models[0]).values())).slots["B"].data[0, 0] = float("nan")

    models: list[Any] = []
    whole = AutoModelForCausalLM.from_pretrained

    def loaded(*arguments: Any, **options: Any) -> Any:
        models.append(whole(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(D2SurgeryError) as error:
        train(replace(config, run=replace(config.run, save_every=3, eval_every=100)), progress=spoil)
    (problem,) = error.value.problems
    assert problem.code == "LOSS_NOT_FINITE"
    assert re.fullmatch(r"step 5, on items\.json, item \d+(; items\.json, item \d+){3}", problem.message)
    found = tensors(folder / "out" / "checkpoint-3")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert not (folder / "out" / "adapter_model.safetensors").exists()


def test_an_adapter_that_is_spoilt_is_not_written_over_a_good_one(folder: Path) -> None:
    """A learning rate of 1e38 leaves infinite values after a step whose own loss was fine."""
    with pytest.raises(D2SurgeryError, match="LOSS_NOT_FINITE") as error:
        train(config_of(folder, "lora", optimizer={"lr": 3e38}, run={"save_every": 1, "eval_every": 100}))
    assert "after step" in error.value.problems[0].message or "step 2" in error.value.problems[0].message
    assert list((folder / "out").glob("checkpoint-*")) == [] or all(
        torch.isfinite(t).all() for p in (folder / "out").glob("checkpoint-*") for t in tensors(p).values()
    )


BAD: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "no such base": ({"base": "/no/such/base"}, "BAD_BASE", "/no/such/base"),
    "no such file": ({"data": {"train": ["/no/items.json"]}}, "FILE_MISSING", "/no/items.json"),
    "no such target": ({"adapter": {"targets": ["q_prj"]}}, "TARGETS_UNMATCHED", "q_prj matches nothing"),
    "not a layer": ({"adapter": {"targets": ["input_layernorm"]}}, "TARGETS_UNMATCHED", "LlamaRMSNorm"),
    "rank": ({"adapter": {"rank": 64}}, "RANK_TOO_HIGH", "k_proj"),
    "warm-up": ({"adapter": {"scaling_warmup": 9}}, "BAD_CONFIG", "would not have finished"),
    "fp16": ({"run": {"precision": "fp16"}}, "BAD_CONFIG", "fp16 is trained on a GPU only"),
    "reporter": ({"run": {"report_to": ["nonsense"]}}, "BAD_CONFIG", "Trainer has no such reporter"),
    "context": ({"data": {"max_length": 400, "train": ["long.json"]}}, "BAD_CONFIG", "longer than the model's"),
    "answer": ({"data": {"max_length": 3}}, "BAD_DATA", "nothing to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_is_said_before_anything_is_written(folder: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    (folder / "long.json").write_text(
        json.dumps([{"question": f"{n}" + "x" * 300, "answer": str(n)} for n in range(9)])
    )
    sections, code, part = BAD[name]
    with pytest.raises(D2SurgeryError) as error:
        train(config_of(folder, "duallora" if name == "warm-up" else "lora", **sections))
    assert codes(error) == {code}
    assert part in str(error.value)
    assert not (folder / "out").exists()


def test_a_model_whose_packed_items_see_one_another_is_refused(folder: Path) -> None:
    """Mamba carries its state from item to item; one item per row is fine."""
    from transformers import MambaConfig, MambaForCausalLM

    (folder / "base").unlink()
    MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=258)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    packed = config_of(folder, "lora", adapter={"targets": ["x_proj"], "rank": 1}, data={"batching": "packed"})
    with pytest.raises(D2SurgeryError, match="MambaForCausalLM packed items see one another"):
        train(packed)
    train(replace(packed, data=replace(packed.data, batching="shuffled")))


def test_training_says_what_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(D2SurgeryError, match="NO_TRAINER: accelerate") as error:
        train(config_of(folder))
    assert "d2surgery[train]" in error.value.problems[0].remedy


# Several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_does_with_twice_the_batch(folder: Path) -> None:
    """Float32 sums in another order, as with accumulated gradients; the same file from the first process alone."""
    config = config_of(folder, "dora", optimizer={"batch": 4})
    train(config)
    halves = replace(to(config, "halves"), optimizer=replace(config.optimizer, batch=2))
    (folder / "halves.toml").write_text(to_toml(halves))
    document = json.loads(two_processes("-m", "d2surgery", "train", str(folder / "halves.toml"), "--json"))
    assert document["steps"] == 8
    one, two = ([line["loss"] for line in lines(folder / name) if "loss" in line] for name in ("out", "halves"))
    assert two == pytest.approx(one, rel=1e-5)
    for name, tensor in tensors(folder / "out").items():
        torch.testing.assert_close(tensors(folder / "halves")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_fsdp2_spreads_adapted_models() -> None:
    """torch's own, on CPU: accelerate begins FSDP on accelerators only."""
    found = [json.loads(line) for line in two_processes(str(TESTS / "sharded.py")).splitlines()]
    assert [record["kind"] for record in found] == list(KINDS)
    for record in found:
        assert record["spread"]
        assert record["gradients"]
        assert record["saved"]
        assert record["losses"][1] == pytest.approx(record["losses"][0], rel=1e-6)
