"""What is done to a right merge: formulas in long double, and whatever goes wrong with files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import effective
from models import f64
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.merging import merge
from mutations.world import (
    DTYPES,
    EMBEDDING,
    HEAD,
    HEADS,
    KV_HEADS,
    MODULES,
    TOP,
    Change,
    Formula,
    Setting,
    edit_json,
    llama,
    load,
    normal,
    rewrite,
    rounded,
    tensors,
)


def nothing(setting: Setting, out: Path) -> None:
    """Our own merge."""


def merged_onto_merged(setting: Setting, out: Path) -> None:
    """The whole merge again, on the checkpoint that a first one wrote."""
    shutil.rmtree(out)
    merge(setting.healthy, setting.adapter, out)


def formula(f: Formula, modules: list[str] | None = None) -> Change:
    return lambda setting, out: rewrite(out, setting.by(f, modules))


def base_again(*names: str) -> Change:
    """These tensors as in the base; modules' weights where no full name is given."""

    def change(setting: Setting, out: Path) -> None:
        before = setting.weights()
        rewrite(out, {name: before[name] for name in names or [f"{m}.weight" for m in setting.values]})

    return change


def tensor(name: str, f: Callable[[Tensor], Tensor | None]) -> Change:
    return lambda setting, out: rewrite(out, {name: f(tensors(out)[name])})


def delta(adapter: Adapter, W: Tensor) -> Any:
    return effective(adapter, W) - wide(W)


def wide(W: Tensor) -> Any:
    return f64(W).astype(np.longdouble)


def strength(factor: float) -> Formula:
    return lambda adapter, W: wide(W) + factor * delta(adapter, W)


def scaled(factor: float) -> Formula:
    """Another alpha."""
    return lambda adapter, W: effective(replace(adapter, scaling=factor * adapter.scaling), W)


def with_fields(**fields: Any) -> Formula:
    return lambda adapter, W: effective(replace(adapter, **fields), W)


def resaved(shard: str = "5GB") -> Change:
    """Loaded and saved by transformers, which renames nothing but may reshard, retie and rewrite the config."""

    def change(setting: Setting, out: Path) -> None:
        model = load(out)
        for file in [*out.glob("*.safetensors*"), out / "config.json"]:
            file.unlink()
        model.save_pretrained(out, max_shard_size=shard)

    return change


# What goes wrong ------------------------------------------------------------------------------------------------------


def eight_bits(W: Tensor) -> Tensor:
    step = W.float().abs().amax(1, keepdim=True) / 127
    return ((W.float() / step).round() * step).to(W.dtype)


def requantised(f: Callable[[Tensor], Tensor]) -> Change:
    def change(setting: Setting, out: Path) -> None:
        found = tensors(out)
        rewrite(out, {f"{m}.weight": f(found[f"{m}.weight"]) for m in setting.values})

    return change


def cut_off(setting: Setting, out: Path) -> None:
    """Rounded toward zero."""
    changed = {}
    for name, near in setting.by(effective).items():
        exact = effective(setting.values[name.removesuffix(".weight")], setting.weights()[name])
        above = torch.from_numpy(np.abs(f64(near)) > np.abs(exact))
        whole = torch.int16 if near.itemsize == 2 else torch.int32
        changed[name] = (near.view(whole) - above.to(whole)).view(near.dtype)
    rewrite(out, changed)


def half_split(W: Tensor, heads: int) -> Tensor:
    """Meta's order of rotary rows to Hugging Face's: the pairs of each head interleaved or in halves."""
    return W.view(heads, HEAD // 2, 2, -1).transpose(1, 2).reshape(W.shape)


def heads_permuted(how: str) -> Change:
    """q and k rows: all in the other rotary order; the delta alone in it; or the heads in another order."""

    def change(setting: Setting, out: Path) -> None:
        before, found, changes = setting.weights(), tensors(out), {}
        for module in MODULES:
            if module.endswith(("q_proj", "k_proj")):
                heads, name = (HEADS if module.endswith("q_proj") else KV_HEADS), f"{module}.weight"
                if how == "rotary":
                    changes[name] = half_split(found[name], heads)
                elif how == "delta":
                    moved = half_split(
                        torch.from_numpy(np.asarray(delta(setting.values[module], before[name]), np.float64)), heads
                    )
                    changes[name] = rounded(wide(before[name]) + wide(moved), setting.dtype)
                else:
                    changes[name] = found[name].view(heads, HEAD, -1).roll(1, 0).reshape(found[name].shape)
        rewrite(out, changes)

    return change


def transposed(adapter: Any, W: Tensor) -> Any:
    return wide(W) + delta(adapter, W).T


def twice(adapter: Any, W: Tensor) -> Any:
    once = effective(adapter, W)
    return effective(adapter, torch.from_numpy(once.astype(np.float64)))


def stale_norm(adapter: Any, W: Tensor) -> Any:
    """m·(W0 + ΔW)/‖W0‖: the norm of the base instead of the sum's."""
    update = adapter.scaling * wide(adapter.B) @ wide(adapter.A)
    norms = np.sqrt((wide(W) ** 2).sum(1, keepdims=True))
    return (wide(W) + update) * (wide(adapter.magnitude)[:, None] / norms)


def other_axis(adapter: Any, W: Tensor) -> Any:
    """The magnitude along the other axis of a square weight."""
    along = "in_features" if adapter.along == "out_features" else "out_features"
    return effective(replace(adapter, along=along), W)


def no_magnitude(adapter: Any, W: Tensor) -> Any:
    return wide(W) + adapter.scaling * wide(adapter.B) @ wide(adapter.A)


def first_magnitude(adapter: Any, W: Tensor) -> Any:
    """The magnitude as it stood before training."""
    return effective(replace(adapter, magnitude=W.double().norm(dim=1)), W)


def no_direction(adapter: Any, W: Tensor) -> Any:
    return wide(W) + adapter.scaling * np.maximum(wide(adapter.B) @ wide(adapter.A), 0)


def no_relu(adapter: Any, W: Tensor) -> Any:
    sign = np.where(wide(adapter.D) @ wide(adapter.C) > 0, 1, -1)
    return wide(W) + adapter.scaling * (wide(adapter.B) @ wide(adapter.A)) * sign


def no_plus(adapter: Any, W: Tensor) -> Any:
    return effective(replace(adapter, B_plus=torch.zeros_like(adapter.B_plus)), W)


def half_rank(adapter: Any, W: Tensor) -> Any:
    kept = adapter.A.clone()
    kept[len(kept) // 2 :] = 0
    return effective(replace(adapter, A=kept), W)


def next_layer(setting: Setting, out: Path) -> None:
    """Every adapter one layer too deep (the last in the first)."""
    before, changes = setting.weights(), {}
    for i in range(2):
        for module in [m for m in MODULES if f".{i}." in m]:
            name = module.replace(f".{i}.", f".{1 - i}.")
            W = before[f"{name}.weight"]
            changes[f"{name}.weight"] = rounded(
                wide(W) + delta(setting.values[module], before[f"{module}.weight"]), setting.dtype
            )
    rewrite(out, changes)


def other_base(noise: float | None) -> Change:
    """The adapter on another model of the same shape: every tensor is off by `noise` of itself, or wholly different."""

    def change(setting: Setting, out: Path) -> None:
        before, changes = setting.weights(), {}
        strange = {name: t.to(DTYPES[setting.dtype]) for name, t in llama(seed=9).state_dict().items()}
        for i, (name, W) in enumerate(before.items()):
            other = strange[name]
            if noise is not None:
                grown = 1 + noise * normal(*W.shape, seed=900 + i).double()
                other = rounded(wide(W) * wide(grown), setting.dtype)
            adapter = setting.values.get(name.removesuffix(".weight"))
            changes[name] = other if adapter is None else rounded(effective(adapter, other), setting.dtype)
        rewrite(out, changes)

    return change


def one_ulp(name: str, at: tuple[int, ...]) -> Change:
    def nudge(t: Tensor) -> Tensor:
        t = t.clone()
        t[at] = torch.nextafter(t[at], torch.tensor(torch.inf, dtype=t.dtype))
        return t

    return tensor(name, nudge)


def not_finite(t: Tensor) -> Tensor:
    t = t.clone()
    t[3, 5] = torch.nan
    return t


def another_step(noise: float) -> Formula:
    """The adapter as it stood some steps earlier: every factor off by `noise` of itself."""

    def formula(adapter: Adapter, W: Tensor) -> Any:
        slots = adapter.slots()
        off: dict[str, Any] = {
            name: slot * (1 + noise * normal(*slot.shape, seed=70 + i))
            for i, (name, slot) in enumerate(slots.items())
            if name != "magnitude"
        }
        return effective(replace(adapter, **off), W)

    return formula


def damaged(name: str, part: Any, f: Callable[[Tensor], Tensor]) -> Change:
    """Some elements of a merged tensor changed."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[part] = f(t[part])
        return t

    return tensor(name, change)


def rows_of_the_base(module: str, count: int) -> Change:
    def change(setting: Setting, out: Path) -> None:
        name = f"{module}.weight"
        merged, before = tensors(out)[name].clone(), setting.weights()[name]
        merged[:count] = before[:count]
        rewrite(out, {name: merged})

    return change


def noisy(share: float) -> Formula:
    """White noise of `share` of the delta's size on top of a right merge."""

    def formula(adapter: Adapter, W: Tensor) -> Any:
        change = delta(adapter, W)
        noise = wide(normal(*W.shape, seed=81))
        return wide(W) + change + noise * share * np.sqrt((change**2).mean())

    return formula


def truncated(setting: Setting, out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def shard_gone(setting: Setting, out: Path) -> None:
    resaved("60KB")(setting, out)
    sorted(out.glob("model-*.safetensors"))[1].unlink()


def config(**fields: Any) -> Change:
    return lambda setting, out: edit_json(out / "config.json", **fields)


def generation_config(setting: Setting, out: Path) -> None:
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.1}))


def tokenizer_changed(setting: Setting, out: Path) -> None:
    content = json.loads((out / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]
    (out / "tokenizer.json").write_text(json.dumps(content))


def tokenizer_gone(setting: Setting, out: Path) -> None:
    for file in [*out.glob("tokenizer*"), *out.glob("special_tokens*")]:
        file.unlink()


def tied_once_more(setting: Setting, out: Path) -> None:
    """The tied head written out, equal to the embedding."""
    rewrite(out, {TOP: tensors(out)[EMBEDDING].clone()})


def both(*changes: Change) -> Change:
    def change(setting: Setting, out: Path) -> None:
        for each in changes:
            each(setting, out)

    return change


def shaped(module: str, damage: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """A right merge, exact before it was rounded, with a damage of some shape to one module; to every one for ""."""

    def damaged(setting: Setting, module: str) -> Tensor:
        before = setting.weights()[f"{module}.weight"]
        merged = torch.from_numpy(np.asarray(effective(setting.values[module], before), np.float64))
        return rounded(damage(merged, before.double()), setting.dtype)

    def change(setting: Setting, out: Path) -> None:
        modules = [module] if module else list(setting.values)
        rewrite(out, {f"{name}.weight": damaged(setting, name) for name in modules})

    return change


def another_seed(adapter: Adapter, W: Tensor) -> Any:
    """An adapter that learnt the same amount elsewhere: other factors of the same sizes."""
    other: dict[str, Any] = {
        name: normal(*slot.shape, seed=W.shape[0] + 31 * i) * slot.std()
        for i, (name, slot) in enumerate(adapter.slots().items())
        if name != "magnitude"
    }
    return effective(replace(adapter, **other), W)


def another_checkpoint(drift: float, growth: float) -> Formula:
    """The same run, later: factors grown by another amount in each module, and off by `drift` of themselves."""

    def formula(adapter: Adapter, W: Tensor) -> Any:
        seed = int(W.double().abs().sum() * 1000) % 100_000
        grown = 1 + growth * float(normal(1, seed=seed))
        slots = adapter.slots()
        off: dict[str, Any] = {
            name: grown * slot * (1 + drift * normal(*slot.shape, seed=seed + i))
            for i, (name, slot) in enumerate(slots.items())
            if name != "magnitude"
        }
        return effective(replace(adapter, **off), W)

    return formula


def float8(scale: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Callable[[Tensor], Tensor]:
    """Through float8 with one scale per tensor, row or column."""

    def change(W: Tensor) -> Tensor:
        largest = W.float().abs()
        top = largest.max() if scale == "tensor" else largest.amax(1 if scale == "row" else 0, keepdim=True)
        step = top / torch.finfo(dtype).max
        return ((W.float() / step).to(dtype).float() * step).to(W.dtype)

    return change


def integers(scale: str) -> Callable[[Tensor], Tensor]:
    """Through int8 with one step per tensor, row or column."""

    def change(W: Tensor) -> Tensor:
        largest = W.float().abs()
        top = largest.max() if scale == "tensor" else largest.amax(1 if scale == "row" else 0, keepdim=True)
        return ((W.float() / top * 127).round() * top / 127).to(W.dtype)

    return change


def two_of_four(W: Tensor) -> Tensor:
    """2:4 pruning: of every four values the two smallest are zero."""
    groups = W.float().view(-1, 4)
    kept = groups.abs() >= groups.abs().sort(1).values[:, 2:3]
    return (groups * kept).view(W.shape).to(W.dtype)


def magnitudes(how: str, rows: list[int], modules: list[str]) -> Change:
    """DoRA's magnitudes of some rows left out, the base's norms, or those of the other rows."""

    def formula(adapter: Any, W: Tensor) -> Any:
        new = adapter.magnitude.double().clone()
        both = W.double() + adapter.scaling * adapter.B.double() @ adapter.A.double()
        source = {"lost": both.norm(dim=1), "the base's": W.double().norm(dim=1), "swapped": new.clone()}[how]
        new[rows] = source[rows[::-1] if how == "swapped" else rows]
        return effective(replace(adapter, magnitude=new), W)

    return lambda setting, out: rewrite(out, setting.by(formula, modules))
