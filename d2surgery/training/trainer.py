"""transformers' Trainer, where it has to know that the trained parameters are the slots of adapters.

What is changed: a checkpoint holds the adapter and not the base, and appears whole or not at all, of FSDP2 as of one
process; learning rates are per slot; a loss that is no number ends the run; rows come in the order they are in; what
clipping changes of Dual LoRA's gradients is logged.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Clipped, counting_clipped
from d2surgery.checkpoint import Checkpoint, load, save
from d2surgery.errors import refuse
from d2surgery.evaluating.freeform import macro_f1, matthews
from d2surgery.files.whole import PARTIAL, write_whole
from d2surgery.formats.layout import About
from d2surgery.live.attaching import adapted, set_warmup, snapshot, trained_whole
from d2surgery.training.disk import BEST, METRICS, PREFIX, keep_newest, read_metrics, remove

JUDGED = ("accuracy", "matthews", "macro_f1")  # of a classifier, beside its loss
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

Progress = Callable[[int, int], None]


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains the slots of the adapted layers."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        lr_ratio: Mapping[str, float],
        about: About,
        keep: int,
        best: bool = False,
        **options: Any,
    ) -> None:
        with _known_to_have_adapters(options["model"]):
            super().__init__(*args, **options)
        self.lr_ratio = lr_ratio
        self.about = about
        self.keep = keep
        self.best = best
        self._clipped: list[Clipped] = []
        self._losses: list[tuple[Tensor, Sequence[str]]] = []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per slot: lr times its ratio; a magnitude does not decay, since its natural value is not 0."""
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            by_slot: dict[str, list[Tensor]] = {}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    by_slot.setdefault(name.rpartition(".")[2], []).append(parameter)
            groups = [
                {
                    "params": parameters,
                    "lr": options["lr"] * self.lr_ratio.get(slot, 1.0),
                    "weight_decay": 0.0 if slot == "magnitude" else self.args.weight_decay,
                    "slot": slot,
                }
                for slot, parameters in by_slot.items()
            ]
            self.optimizer = make(groups, **options)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Trainer's; see `_check_losses`."""
        names = inputs.pop("names")
        result = super().compute_loss(model, inputs, *args, **options)
        self._losses.append(((result[0] if isinstance(result, tuple) else result).detach(), names))
        if not model.training:
            self._check_losses("evaluation on held-out items")
        return result

    def _check_losses(self, where: str) -> None:
        """A look at all micro-batches at once, since a GPU is waited for."""
        losses, self._losses = self._losses, []
        for loss, names in losses:
            if not torch.isfinite(loss).all():
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                message = f"{where}, on {'; '.join(names[:8])}{more}"
                raise refuse("LOSS_NOT_FINITE", message, got=str(loss.item()))

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Trainer's; before a line of the log the entries of Dual LoRA's gradients that were clipped are counted.

        Raises LOSS_NOT_FINITE after the last micro-batch of a step, before its gradient reaches anything.
        """
        step, last = self.state.global_step + 1, self.state.max_steps
        logged = step in (1, last) or not step % int(self.args.logging_steps)
        with counting_clipped() if logged else nullcontext() as found:
            loss: Tensor = super().training_step(*args, **options)
        self._clipped += [found] if found else []
        if self.accelerator.sync_gradients:
            self._check_losses(f"step {step}")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        entries = sum(found.entries for found in self._clipped)
        if "loss" in logs and entries:
            logs["clipped"] = sum(float(found.changed) for found in self._clipped) / entries
        self._clipped = self._clipped if "eval_loss" in logs else []
        super().log(logs, *args, **options)

    @property
    def best_step(self) -> int | None:
        """Of the adapter in `best`, where one is kept."""
        return self.state.best_global_step if self.best else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's; a new best adapter is written at once, whole or not at all."""
        new: bool = super()._determine_best_metric(metrics, trial)
        if new:
            self.state.best_global_step = self.state.global_step
        if new and self.best:
            out = Path(self.args.output_dir)
            self.save_model(str(out / PARTIAL / BEST))
            if self.args.should_save:
                shutil.rmtree(out / BEST, ignore_errors=True)
                (out / PARTIAL / BEST).rename(out / BEST)
            self.accelerator.wait_for_everyone()
        return new

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone. Raises LOSS_NOT_FINITE rather than write one that is spoilt."""
        checkpoint = snapshot(self.model, self.about)  # every process: parameters may be spread over them
        if not self.args.should_save:
            return
        for module, adapter in checkpoint.items():
            bad = [slot for slot, tensor in adapter.slots().items() if not torch.isfinite(tensor).all()]
            if bad:
                message = f"after step {self.state.global_step} {', '.join(bad)} is not finite"
                raise refuse("LOSS_NOT_FINITE", message, module=module)
        save(checkpoint, output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # into _get_output_dir
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            out, name = Path(self.args.output_dir), f"{PREFIX}{self.state.global_step}"
            if (out / name).exists():  # of a run that was resumed from before it
                remove(out, out / name)
            (out / PARTIAL / name).rename(out / name)
            keep_newest(out, self.keep)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / PARTIAL)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of FSDP2 the whole optimizer state, gathered: slots are small, and the frozen base has none."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation a head is whole, another tensor than the optimizer knows
        state = get_optimizer_state_dict(self.model, self._plain_optimizer(), options=_WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state, options=_WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.model if model is None else model, load(resume_from_checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


@contextmanager
def _known_to_have_adapters(model: nn.Module) -> Iterator[None]:
    """Trainer refuses to train a quantised model without adapters, and knows none but PEFT's. This is the sign by which
    it knows them, set for as long as it looks: `save_pretrained` and others would look for PEFT's config by it."""
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


@torch.no_grad()
def restore(model: nn.Module, stored: Mapping[str, Adapter]) -> None:
    """Give every slot, and what is trained whole, its stored value."""
    for module, layer in adapted(model).items():
        for slot, tensor in stored[module].slots().items():
            _give(layer.slots[slot], tensor)
    if isinstance(stored, Checkpoint):
        whole = trained_whole(model)
        for name, key in stored.layout.replacements.items():
            _give(whole[name], stored.tensor(key))


def _give(parameter: Tensor, value: Tensor) -> None:
    """Its value, or this process's part of it where FSDP2 has spread it."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def judged_labels(predicted: Any) -> dict[str, float]:
    """Trainer's metrics of a classifier."""
    found = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    gold, picked = predicted.label_ids.tolist(), found.argmax(-1).tolist()
    right = sum(a == b for a, b in zip(gold, picked, strict=True))
    return {"accuracy": right / len(gold), "matthews": matthews(gold, picked), "macro_f1": macro_f1(gold, picked)}


class Warmup(TrainerCallback):  # type: ignore[misc]
    """w(t) = min(1, t/steps) on the scaling, t the steps done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._set(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._set(state, model)

    def _set(self, state: Any, model: nn.Module) -> None:
        set_warmup(model, min(1.0, state.global_step / self.steps) if self.steps else 1.0)


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Trainer's early stopping, which goes on counting where a checkpoint left off."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        super().on_train_begin(args, state, control, **options)
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored:
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]


class Flow(TrainerCallback):  # type: ignore[misc]
    """Logs and evaluates at the end; logs with every checkpoint, since a mean over steps that a resumed run did not
    see would differ; and at a first Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops."""

    def __init__(self, progress: Progress, *, evaluates: bool) -> None:
        self.progress = progress
        self.evaluates = evaluates
        self.interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_evaluate |= last and self.evaluates
        if self.interrupted and not last:
            control.should_training_stop = control.should_save = True
        control.should_log |= last or control.should_save
        self.progress(state.global_step, state.max_steps)

    @contextmanager
    def catching_signals(self, *, alone: bool) -> Iterator[None]:
        """Several processes would not stop after the same step: they keep the signals' own effect."""
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


class Metrics(TrainerCallback):  # type: ignore[misc]
    """A line of metrics.jsonl per log: step, epoch, loss, lr, grad_norm, tokens, seconds; or step and eval_loss.

    `clipped` is the share of Dual LoRA's gradients through the sign that `ste` changed in the last step: at 0, clip,
    mask and identity are one.
    `seconds` are those of the steps since the process began, without evaluations and checkpoints.
    """

    def __init__(self, out: Path, tokens: Sequence[int], epochs: float) -> None:
        self.path = out / METRICS
        self.tokens = tokens  # in the first n steps
        self.epochs = epochs
        self.seconds = 0.0
        self.steps = 0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], optimizer: Any = None, **_: Any
    ) -> None:
        line: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            line |= {name: logs[f"eval_{name}"] for name in JUDGED if f"eval_{name}" in logs}
            line["eval_loss"] = logs["eval_loss"]
        elif "loss" in logs:
            line |= {"epoch": round(self.epochs * state.global_step / state.max_steps, 4), "loss": logs["loss"]}
            line |= {"lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            line |= {"clipped": logs["clipped"]} if "clipped" in logs else {}
            line |= {"tokens": self.tokens[state.global_step], "seconds": round(self.seconds, 3)}
        if len(line) > 1 and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: _plain(value) for name, value in line.items()}) + "\n")


def forget_after(out: Path, step: int) -> None:
    """Remove the lines of metrics.jsonl that the resumed run will write again."""
    kept = [line for line in read_metrics(out) if line["step"] <= step]
    write_whole(out / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def _plain(value: Any) -> Any:
    """A number that JSON has."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
