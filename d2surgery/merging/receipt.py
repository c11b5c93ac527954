"""What a merge leaves of itself: the recipe that decides its bytes, and the receipt that lies beside them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2surgery.errors import Problem
from d2surgery.files.tensors import as_bytes
from d2surgery.formats.layout import Layout
from d2surgery.merging.prepared import Prepared


def recipe_of(prepared: Prepared, shard_size: int, verify: bool, adapter_hashes: Mapping[str, str]) -> dict[str, Any]:
    """All that decides the bytes written. The files' times stand in the journal, not in the receipt."""
    adapter = json.dumps([adapter_hashes, _decisive(prepared.fit.layout)])
    return {
        "files": [file.stamp for file in prepared.fit.base.seen],
        "adapter": hashlib.sha256(adapter.encode()).hexdigest(),
        "versions": [version("d2surgery"), torch.__version__],
        "dtype": prepared.dtype,
        "strength": prepared.fit.strength,
        "tokenizer": prepared.tokenizer,
        "shard_size": shard_size,
        "tile": prepared.merger.grid,
        "device": prepared.merger.device.type,
        "arithmetic": arithmetic(prepared.merger.device),
        "verify": verify,
    }


def receipt_of(
    prepared: Prepared,
    recipe: Mapping[str, Any],
    adapter: Mapping[str, str],
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    beside: Mapping[str, bytes],
    problems: Sequence[Problem],
) -> dict[str, Any]:
    """What was merged from what, by sha256; no path and no time, which differ from one machine to the next."""
    base_model = prepared.fit.layout.base_model
    return {
        "schema_version": 1,
        "d2surgery": version("d2surgery"),
        "torch": torch.__version__,
        "recipe": {k: v for k, v in recipe.items() if k not in ("files", "adapter")},
        "base": {"tensors": dict(sorted(inputs.items()))},
        "adapter": {"tensors": adapter, "base_model": None if _is_path(base_model) else base_model},
        "outputs": {
            "tensors": dict(sorted(outputs.items())),
            "forms": {output.name: [output.dtype, *output.shape] for output in prepared.outputs},
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(beside.items())},
        },
        "untied": prepared.fit.landing.untied,
        "problems": [asdict(problem) for problem in problems],
    }


def _decisive(layout: Layout) -> list[Any]:
    """What decides the values of an adapter beside its tensors."""
    return [
        [module, entry.scaling, dict(entry.settings), list(entry.blocked)] for module, entry in layout.adapters.items()
    ]


def _is_path(base_model: str | None) -> bool:
    return base_model is not None and Path(base_model).is_absolute()


# Arithmetic ------------------------------------------------------------------------------------------------------


def arithmetic(device: torch.device) -> dict[str, str]:
    """Which library and instruction set compute on a device, and the sha256 of how they round: where `sums` differs,
    so do some last bits of a merge."""
    if device.type == "cuda":
        library, instructions = f"CUDA {torch.version.cuda}", torch.cuda.get_device_name(device)
    else:
        library, instructions = linear_algebra(), torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256()
    for values in _rounded_sums(device):
        digest.update(as_bytes(values.cpu().contiguous()))
    return {"library": library, "instructions": instructions, "sums": digest.hexdigest()[:16]}


def linear_algebra() -> str:
    """The name and version of torch's linear algebra on a CPU, as its build says."""
    built = torch.__config__.show()
    found = re.search(r"(?:oneAPI )?Math Kernel Library Version [\d.]+", built) or re.search(r"BLAS_INFO=\w+", built)
    return found[0] if found else "unknown"


@torch.no_grad()
def _rounded_sums(device: torch.device) -> Iterator[Tensor]:
    """The operations that a merge is made of, on numbers that every machine has alike."""
    whole = (torch.arange(96 * 512) * 2654435761 % 2**32).double().view(96, 512) / 2**32 - 0.5
    for dtype in (torch.float32, torch.float64):
        W = whole.to(device, dtype)
        P, Q = W[:, :8].contiguous(), W[:8].contiguous()
        yield from (P @ Q, Q @ W.T, W @ W.T, torch.addmm(W, P, Q), torch.linalg.vector_norm(W, dim=1), W.sum(1))
    yield torch.linalg.qr(whole.to(device)[:8].T, mode="r").R
