"""Mergers elsewhere: PEFT's own, and the arithmetic of others in the order and the precision of their source."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from peft import PeftModel
from torch import Tensor

from d2surgery.adapters import DoRA, LoRA
from mutations.world import DTYPES, PEFT_KINDS, Change, Setting, load, rewrite

Arithmetic = Callable[[Any, Tensor], Tensor]


def peft_merge(*, safe: bool, compute: str | None = None, autocast: bool = True) -> Change:
    """The real merge_and_unload, saved by transformers; `compute` loads the base in that dtype and casts afterwards."""

    def change(setting: Setting, out: Path) -> None:
        dtype = DTYPES[compute or setting.dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = load(setting.base, dtype, setting.extra)
            model = PeftModel.from_pretrained(base, setting.adapter, autocast_adapter_dtype=autocast)
            merged = model.merge_and_unload(safe_merge=safe).to(DTYPES[setting.dtype])
            shutil.rmtree(out)
            merged.save_pretrained(out)
        words = setting.adapter if setting.extra.more_rows else setting.base
        T.AutoTokenizer.from_pretrained(words).save_pretrained(out)

    return change


def arithmetic(f: Arithmetic) -> Change:
    def change(setting: Setting, out: Path) -> None:
        before = setting.weights()
        rewrite(out, {f"{m}.weight": f(a, before[f"{m}.weight"]) for m, a in setting.values.items()})

    return change


def torchtune(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """torchtune 0.6.1 get_merged_lora_ckpt with an adapter in the base's dtype, as its recipes train it."""
    a, b = adapter.A.to(W.dtype), adapter.B.to(W.dtype)
    if isinstance(adapter, DoRA):
        merged = W + adapter.scaling * b @ a
        gain: Tensor = adapter.magnitude.to(W.dtype) / torch.linalg.norm(merged, dim=1)
        return merged * gain.view(-1, 1)
    merged = W.clone()
    merged += adapter.scaling * b @ a
    return merged


def torchtune_wide(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """The same with a float32 adapter: `+=` rounds once."""
    merged = W.clone()
    merged += adapter.scaling * adapter.B @ adapter.A
    return merged


def mlx(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """mlx-lm 0.32.2 fuse: the update is rounded to the weight's dtype before it is added."""
    return W + ((adapter.scaling * adapter.B) @ adapter.A).to(W.dtype)


def unsloth(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """unsloth_zoo 2026.10.9 _merge_lora: float32 addmm, one cast."""
    merged = torch.addmm(W.float(), adapter.B.float(), adapter.A.float(), alpha=float(adapter.scaling))
    if isinstance(adapter, DoRA):
        merged = (adapter.magnitude / torch.linalg.norm(merged, dim=1).clamp_min(1e-9)).unsqueeze(1) * merged
    return merged.to(W.dtype)


def axolotl(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """axolotl 0.19.0: PEFT's delta, for DoRA its merged weight minus the base, added in float32, one cast."""
    update = (adapter.B.float() @ adapter.A.float()) * adapter.scaling
    if isinstance(adapter, DoRA):
        V = W + update
        update = (V * (adapter.magnitude / torch.linalg.norm(V, dim=1)).view(-1, 1)).to(W.dtype) - W
    return (W.float() + update.float()).to(W.dtype)


def litgpt(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """litgpt 0.5.13: the base goes to the adapter's dtype, float32 here; the file is cast back."""
    merged = W.to(adapter.A.dtype)
    merged += (adapter.B @ adapter.A) * adapter.scaling
    return merged.to(W.dtype)


def subtract_and_add_again(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """A merge in float32, unmerged to read the base back, merged again."""
    update = (adapter.B @ adapter.A) * adapter.scaling
    merged = W.float() + update
    return ((merged - update) + update).to(W.dtype)


def tf32(adapter: LoRA | DoRA, W: Tensor) -> Tensor:
    """Factors cut to 11 bits, as NVIDIA's tensor cores take float32 where it is allowed; sums in float32."""

    def cut(t: Tensor) -> Tensor:
        return (t.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    return (W.float() + (cut(adapter.B) @ cut(adapter.A)) * adapter.scaling).to(W.dtype)


ELSEWHERE: dict[str, tuple[Arithmetic, tuple[str, ...]]] = {
    "torchtune": (torchtune, PEFT_KINDS),
    "torchtune, float32 adapter": (torchtune_wide, ("lora", "rslora")),
    "mlx-lm": (mlx, ("lora", "rslora")),
    "unsloth": (unsloth, PEFT_KINDS),
    "axolotl": (axolotl, PEFT_KINDS),
    "litgpt": (litgpt, ("lora",)),
    "TF32 products": (tf32, ("lora", "rslora")),
    "subtract and add again": (subtract_and_add_again, ("lora",)),
}
