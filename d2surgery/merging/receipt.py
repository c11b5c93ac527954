"""What a merge leaves of itself: the recipe that decides its bytes, and the receipt that lies beside them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2surgery.errors import Problem
from d2surgery.files.tensors import as_bytes
from d2surgery.formats.layout import Layout

RECEIPT = "d2surgery_merge.json"


def recipe_of(
    layout: Layout,
    adapter_hashes: Mapping[str, str],
    device: torch.device,
    **choices: Any,
) -> dict[str, Any]:
    """All that decides the bytes written. The files' times stand in the journal, not in the receipt."""
    return {
        "adapter": hashlib.sha256(json.dumps([adapter_hashes, dict(layout.config)]).encode()).hexdigest(),
        "versions": [version("d2surgery"), torch.__version__],
        "device": device.type,
        "arithmetic": arithmetic(device),
        **choices,
    }


def receipt_of(
    layout: Layout,
    recipe: Mapping[str, Any],
    adapter: Mapping[str, str],
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    beside: Mapping[str, bytes],
    *,
    untied: bool,
    problems: tuple[Problem, ...],
) -> dict[str, Any]:
    """What was merged from what, by sha256; no path and no time, which differ from one machine to the next."""
    base_model = layout.base_model
    return {
        "schema_version": 1,
        "d2surgery": version("d2surgery"),
        "torch": torch.__version__,
        "recipe": {k: v for k, v in recipe.items() if k not in ("files", "adapter")},
        "base": {"tensors": dict(sorted(inputs.items()))},
        "adapter": {"tensors": adapter, "base_model": None if _is_path(base_model) else base_model},
        "outputs": {
            "tensors": dict(sorted(outputs.items())),
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(beside.items())},
        },
        "untied": untied,
        "problems": [asdict(problem) for problem in problems],
    }


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
