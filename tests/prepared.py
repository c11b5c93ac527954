"""Run by torchrun in two processes: training as accelerate prepares FSDP2, of every kind, whole and resumed.

    torchrun … tests/prepared.py CONFIG.toml …

accelerate begins FSDP2 on accelerators only; here its state is told that two processes on a CPU are two of them, and
all else is its own: ram-efficient loading (the second process never reads the base), meta, sharding, broadcast.
Prints a line of JSON per config, from the first process.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from d2surgery.training.config import read_config
from d2surgery.training.loop import train
from d2surgery.training.settings import TrainConfig

RANK = int(os.environ["RANK"])
whole_init = AcceleratorState.__init__
models: list[Any] = []


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    whole_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def watched(kind: Any) -> None:
    """Keep what a class loads, and say where it lies."""
    whole = kind.from_pretrained

    def loaded(*args: Any, **options: Any) -> Any:
        found = whole(*args, **options)
        models[:] = [found[0] if isinstance(found, tuple) else found]
        held.append(models[0].get_input_embeddings().weight.device.type)
        return found

    kind.from_pretrained = loaded


AcceleratorState.__init__ = init
watched(AutoModelForCausalLM)
watched(AutoModelForSequenceClassification)
held: list[str] = []


class Stopped(Exception):
    """Between two steps, in every process."""


def stop(done: int, total: int) -> None:
    if done == 3:
        raise Stopped


def run(config: TrainConfig, **options: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    return train(config, **options)


def compared(config: TrainConfig) -> dict[str, Any]:
    report = run(config)
    learning = [p for p in models[0].parameters() if p.requires_grad]
    again = replace(config, output=f"{config.output}-again")
    try:
        run(again, progress=stop)
    except Stopped:
        torch.distributed.barrier()
    resumed = run(again, resume=True)
    return {
        "kind": config.adapter.kind,
        "spread": all(isinstance(p, DTensor) for p in learning),
        "held": [*held],
        "eval_loss": report.last_eval_loss,
        "resumed_from": resumed.resumed_from,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        found = compared(read_config(path))
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, found["held"])
        if RANK == 0:
            print(json.dumps({**found, "held": everyone}))
    torch.distributed.destroy_process_group()
