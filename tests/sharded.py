"""Run by torchrun in two processes: FSDP2 spreads adapted models, and what is computed, saved and restored is the same.

Prints a line of JSON per kind. The real test is in test_training_loop.
"""

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from models import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from d2surgery import KINDS
from d2surgery.live.attaching import adapted, attach, initial, snapshot
from d2surgery.training.trainer import restore

IDS = torch.arange(20)[None] % 32


def compared(kind: str, mesh: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    whole = llama()
    attach(whole, initial(whole, kind, "all-linear", rank=4, scaling=1.0, generator=torch.Generator().manual_seed(0)))
    spread = copy.deepcopy(whole)
    for layer in spread.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (whole, spread)]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    gathered = {name: p.grad.full_tensor() for name, p in spread.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for slots in (layer.slots for layer in adapted(whole).values()):
            for slot in slots.values():
                slot.add_(1.0)
    restore(spread, snapshot(whole))
    saved = snapshot(spread)
    return {
        "kind": kind,
        "spread": all(isinstance(slot, DTensor) for layer in adapted(spread).values() for slot in layer.slots.values()),
        "losses": [float(loss.detach()) for loss in losses],
        "gradients": gradients.keys() == gathered.keys()
        and all(torch.allclose(gradients[n], gathered[n], rtol=1e-5, atol=1e-8) for n in gradients),
        "saved": all(
            torch.equal(slot, saved[module].slots()[name])
            for module, adapter in snapshot(whole).items()
            for name, slot in adapter.slots().items()
        ),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    two = init_device_mesh("cpu", (2,))
    for every in KINDS:
        found = compared(every, two)
        if dist.get_rank() == 0:
            print(json.dumps(found))
    dist.destroy_process_group()
