"""train: a base, a config, data → an adapter, resumable at any step."""

import importlib.util
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2surgery.adapters import KINDS, Adapter
from d2surgery.adapters.duallora import START
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.whole import PARTIAL, write_whole
from d2surgery.formats.layout import About
from d2surgery.kinds import TABLE
from d2surgery.live.attaching import ALL_LINEAR, adapted, attach, initial, set_warmup, train_whole
from d2surgery.live.quantization import Quantization, quantization_in
from d2surgery.training.bases import check_fit, check_packing, device_of, model_of, pad_token, tokenizer_of
from d2surgery.training.config import differences, read_config, to_toml
from d2surgery.training.data import Collate, Corpus, Rows, read_corpus
from d2surgery.training.disk import (
    BEST,
    CONFIG,
    METRICS,
    check_whole,
    checkpoints,
    full_disk_named,
    keep_newest,
    read_json,
    read_metrics,
    step_of,
    written_alone,
)
from d2surgery.training.planning import Schedule, TrainPlan, plan_of, schedule_of, world
from d2surgery.training.reporters import check_reporters, failures_named
from d2surgery.training.settings import TrainConfig

if TYPE_CHECKING:
    from d2surgery.training.trainer import AdapterTrainer, Flow, Metrics

INPUTS = "inputs.json"
_OTHER_LAUNCHES = {  # how accelerate says them to its processes
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "false"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "false"),
    "PARALLELISM_CONFIG_TP_SIZE": ("tensor parallelism", "1"),
    "PARALLELISM_CONFIG_CP_SIZE": ("context parallelism", "1"),
    "PARALLELISM_CONFIG_SP_SIZE": ("sequence parallelism", "1"),
}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What came of it. Losses are means over answer tokens, of held-out items or of the logged steps."""

    out: str
    kind: str
    modules: int
    trainable_parameters: int
    quantization: Quantization | None
    steps: int
    tokens: int
    first_eval_loss: float | None
    last_eval_loss: float | None
    best_step: int | None  # with run.best: after which step the adapter was as it is saved
    best_loss: float | None  # and its loss on held-out items
    first_loss: float | None
    last_loss: float | None
    seconds_per_step: float | None  # of the steps of this process; None where it had none to do
    resumed_from: int | None
    problems: tuple[Problem, ...]


def _silent(done: int, total: int) -> None:
    pass


def _unheard(plan: TrainPlan) -> None:
    pass


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] = _silent,
    announce: Callable[[TrainPlan], None] = _unheard,
) -> TrainReport:
    """Fine-tune a base with one adapter and save it in config.output, with train.toml and metrics.jsonl.

    With `resume` it goes on from the last checkpoint there is, or begins where there is none, and ends with the same
    adapter, bit for bit on one machine, as a run that was never stopped. Under `torchrun` or `accelerate launch` each
    process takes its share of each step. One run writes to an output at a time. Raises D2SurgeryError: BAD_CONFIG,
    BAD_DATA, BAD_BASE, TARGETS_UNMATCHED, RANK_TOO_HIGH, OUTPUT_EXISTS, OUTPUT_IN_USE, RESUME_MISMATCH,
    DAMAGED_CHECKPOINT, LOSS_NOT_FINITE, DISK_FULL, NO_TRAINER, REPORTER_FAILED and those of
    quantised bases; KeyboardInterrupt with the checkpoint's name after Ctrl-C.
    """
    _check_packages(config)
    first = int(os.environ.get("RANK", "0")) == 0
    with written_alone(Path(config.output), config.base) if first else nullcontext():
        return _train(config, resume, progress, announce)


def _train(
    config: TrainConfig, resume: bool, progress: Callable[[int, int], None], announce: Callable[[TrainPlan], None]
) -> TrainReport:
    out = Path(config.output)
    checkpoint = _begin_in(out, config, resume)
    tokenizer = tokenizer_of(config)
    corpus = read_corpus(config.data, tokenizer, config.run.seed)
    schedule = schedule_of(config, corpus)
    inputs = {"data_sha256": corpus.digest, "rows_per_step": schedule.rows_per_step}
    if checkpoint is not None:
        _check_inputs(out, inputs)
    arguments = _arguments(config, schedule, evaluates=bool(corpus.held_out), fresh=checkpoint is None)
    model, made_up = model_of(config, corpus, tokenizer)
    check_fit(config, model, corpus)
    start = {name: adapter for name, adapter in _start(config, model).items() if f"{name}.weight" not in made_up}
    attach(model, start, dropout=config.adapter.dropout)
    if corpus.labels:
        train_whole(model, made_up)
    if config.data.batching == "packed":
        check_packing(model)
    from d2surgery.training.trainer import forget_after  # transformers, accelerate

    resumed_from = None if checkpoint is None else step_of(checkpoint)
    plan = plan_of(config, model, corpus, schedule, resumed_from)
    announce(plan)
    trainer, flow, metrics = _trainer(config, model, tokenizer, corpus, schedule, progress, arguments)
    with full_disk_named(out):
        if trainer.args.should_save:
            write_whole(out / CONFIG, to_toml(config))
            write_whole(out / INPUTS, json.dumps(inputs, indent=2))
            forget_after(out, resumed_from if resumed_from is not None else -1)
        with flow.catching_signals(alone=world() == 1), failures_named(config.run.report_to):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if trainer.state.global_step < schedule.steps and flow.interrupted:
            raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step}; --resume goes on from there")
        _publish(trainer, out)
    seconds = metrics.seconds / metrics.steps if metrics.steps else None
    lines = read_metrics(out)
    best_loss = trainer.state.best_metric if config.run.best else None
    report = replace(_report(out, plan, lines, seconds), best_step=trainer.best_step, best_loss=best_loss)
    return replace(report, steps=trainer.state.global_step)


# Before the first step -------------------------------------------------------------------------------------------


def _check_packages(config: TrainConfig) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise refuse("NO_TRAINER", "accelerate is not installed")
    check_reporters(config.run.report_to)
    if config.run.precision == "fp16" and device_of(config).type == "cpu":
        raise refuse("BAD_CONFIG", "fp16 is trained on a GPU only", module="run.precision", wanted="bf16 or fp32")
    raise_errors(
        Problem(code="BAD_CONFIG", message=f"{name} was not tested with these adapters", module="accelerate",
                got=f"{variable}={os.environ[variable]}", wanted="DDP, or FSDP with fsdp_version: 2")
        for variable, (name, off) in _OTHER_LAUNCHES.items() if os.environ.get(variable, off).lower() != off
    )  # fmt: skip


def _begin_in(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from, where there is one."""
    found = checkpoints(out)
    if not resume:
        there = [path for path in (out / "adapter_model.safetensors", *found) if path.exists()]
        there += [out / METRICS] if read_metrics(out) else []  # an empty one: the run ended before its first step
        if there:
            message = "a training run is there already"
            raise refuse("OUTPUT_EXISTS", message, file=str(there[0]), wanted="--resume, or another output")
    elif (out / CONFIG).exists():
        check_same(out, config)
    if found:
        check_whole(found[-1])
    return found[-1] if found else None


def check_same(out: Path, config: TrainConfig) -> None:
    """Raises RESUME_MISMATCH with every setting that is not what the run in `out` began with."""
    raise_errors(
        Problem(code="RESUME_MISMATCH", message="not what the run began with", file=str(out), module=key,
                wanted=repr(was), got=repr(now))
        for key, (was, now) in differences(read_config(out / CONFIG), config).items()
    )  # fmt: skip


def _check_inputs(out: Path, inputs: Mapping[str, Any]) -> None:
    """The same files may hold other items, and other processes share a step otherwise: both change every step."""
    before = read_json(out / INPUTS)
    raise_errors(
        Problem(code="RESUME_MISMATCH", message="not what the run began with", file=str(out), module=name,
                wanted=str(before.get(name)), got=str(value))
        for name, value in inputs.items() if before.get(name) != value
    )  # fmt: skip


def _start(config: TrainConfig, model: Any) -> dict[str, Adapter]:
    targets = config.adapter.targets
    return initial(
        model,
        config.adapter.kind,
        ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        rank=config.group_rank,
        scaling=config.scaling,
        generator=torch.Generator().manual_seed(config.run.seed),
        **config.kind_options,
    )


def _report(out: Path, plan: TrainPlan, lines: Sequence[Mapping[str, Any]], seconds: float | None) -> TrainReport:
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    return TrainReport(
        out=str(out),
        kind=plan.kind,
        modules=plan.modules,
        trainable_parameters=plan.trainable_parameters,
        quantization=plan.quantization,
        steps=plan.steps,
        tokens=plan.tokens,
        first_eval_loss=evaluations[0] if evaluations else None,
        last_eval_loss=evaluations[-1] if evaluations else None,
        best_step=None,
        best_loss=None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        seconds_per_step=seconds,
        resumed_from=plan.resumed_from,
        problems=plan.problems,
    )


# Trainer ---------------------------------------------------------------------------------------------------------


def _trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    schedule: Schedule,
    progress: Callable[[int, int], None],
    arguments: Any,
) -> "tuple[AdapterTrainer, Flow, Metrics]":
    from transformers import PrinterCallback

    from d2surgery.training.trainer import AdapterTrainer, Flow, Metrics, Patience, Warmup, judged_labels

    flow = Flow(progress, evaluates=bool(corpus.held_out))
    metrics = Metrics(Path(config.output), schedule.tokens, schedule.epochs)
    held_out = [(number,) for number in range(len(corpus.held_out))]
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(corpus.train, schedule.rows),
        eval_dataset=Rows(corpus.held_out, held_out) if held_out else None,
        data_collator=Collate(
            pad_token(tokenizer),
            config.data.batching == "packed",
            labelled=bool(corpus.labels),
            answers_only=_answers_only(config, model),
        ),
        compute_metrics=judged_labels if corpus.labels else None,
        callbacks=[Warmup(schedule.scaling_warmup), flow, metrics],
        lr_ratio=config.optimizer.lr_ratio,
        about=_about(config, model, schedule),
        keep=config.run.keep,
        best=config.run.best,
    )
    if corpus.labels:  # else Trainer takes a classifier's mean for a share of the whole step's
        trainer.model_accepts_loss_kwargs = False
    if config.run.patience:
        trainer.add_callback(Patience(config.run.patience))
    trainer.remove_callback(PrinterCallback)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        message = "FSDP 1 flattens frozen and trained parameters together"
        raise refuse("BAD_CONFIG", message, module="accelerate", wanted="fsdp_version: 2")
    if plugin is not None and quantization_in(model):
        message = "FSDP would split weights that bitsandbytes has packed"
        raise refuse("BAD_CONFIG", message, module="accelerate", wanted="DDP, or no quantisation")
    return trainer, flow, metrics


def _answers_only(config: TrainConfig, model: Any) -> bool:
    """Whether the model computes logits where they are asked for, and its loss from these. A compiled model would be
    compiled again for each number of them."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    takes = config.data.goal == "answers" and "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return takes and not config.run.compile and model.loss_function is ForCausalLMLoss


def _arguments(config: TrainConfig, schedule: Schedule, *, evaluates: bool, fresh: bool) -> Any:
    from transformers import TrainingArguments

    optimizer, run, steps = config.optimizer, config.run, schedule.steps
    constant = "constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule
    alone = device_of(config).type == "cpu"
    arguments = TrainingArguments(
        output_dir=config.output,
        max_steps=steps,
        per_device_train_batch_size=optimizer.batch,
        per_device_eval_batch_size=optimizer.batch,
        gradient_accumulation_steps=optimizer.accumulation,
        learning_rate=optimizer.lr,
        lr_scheduler_type=constant,
        warmup_steps=round(optimizer.warmup * steps),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        torch_compile=run.compile,
        tf32=False,  # compiling would turn it on, and fp32 is asked for
        seed=run.seed,
        use_cpu=alone,
        logging_steps=run.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=schedule.every(run.eval_every),
        eval_on_start=evaluates and fresh,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=schedule.every(run.save_every),
        report_to=list(run.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        prediction_loss_only=config.data.goal == "answers",
        label_names=["labels"],
        dataloader_pin_memory=not alone,
        ddp_find_unused_parameters=False,  # every slot is used in every step
        **({"ddp_backend": "gloo"} if alone and world() > 1 else {}),
    )
    arguments._n_gpu = min(
        1, arguments.n_gpu
    )  # else Trainer spreads one process by DataParallel, with more rows a step
    return arguments


def _about(config: TrainConfig, model: Any, schedule: Schedule) -> About:
    """What the file says beside the values. PEFT's own kinds have no place for how they were trained."""
    adapter = next(iter(adapted(model).values())).adapter
    shown = About(base_model=config.base, task="CAUSAL_LM" if config.data.goal == "answers" else "SEQ_CLS")
    if not TABLE[config.adapter.kind].training:
        return replace(shown, settings={"lora_dropout": config.adapter.dropout, "use_rslora": config.adapter.rslora})
    start = inspect.signature(KINDS[adapter.kind].init).parameters["sigma"].default
    sigma = start if config.adapter.sigma is None else config.adapter.sigma
    sigmas = {"start": START} if sigma is None else {"sigma": sigma}
    training = {**sigmas, "dropout": config.adapter.dropout, "seed": config.run.seed, "steps": schedule.steps}
    if quantization := quantization_in(model):
        training["quantization"] = quantization
    if schedule.scaling_warmup:
        training["scaling_warmup"] = schedule.scaling_warmup
    return replace(shown, training=training)


def _publish(trainer: "AdapterTrainer", out: Path) -> None:
    """The trained adapter, in the place of what an earlier end of the same run left."""
    if trainer.best_step is None:
        set_warmup(trainer.model, 1.0)
    if trainer.args.should_save:
        (out / "adapter_model.safetensors").unlink(missing_ok=True)
    if trainer.best_step is None:
        trainer.save_model(str(out))
    elif trainer.args.should_save:
        for file in sorted((out / BEST).iterdir()):
            shutil.copyfile(file, out / file.name)
    if trainer.args.should_save:
        keep_newest(out, trainer.keep)  # a run may have been killed before it did
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
