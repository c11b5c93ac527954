"""Merges that are right and merges that are wrong: what an audit must say of each.

One tiny Llama (hidden 64, two layers, grouped-query attention with biases) per dtype, adapters of every kind with a
realistic update (1 % of the base; 0.1 % where a case says so), written by PEFT where PEFT has the kind. A `Case` names
how the merged directory comes about, the verdict, and the codes. Weights by formula are numpy's long double, rounded
once: independent of the engine under test. Mergers that do not install beside this project's pins are their
arithmetic again, in the order and the precision of their source (see `ELSEWHERE`).
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from kinds import effective
from models import f64, round_to
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.checkpoint import from_adapters, save
from d2surgery.merging import merge

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
KINDS = ("lora", "rslora", "dora", "duallora", "d2lora")
PEFT_KINDS = ("lora", "rslora", "dora")
RANK, ALPHA = 8, 11  # a scaling that is no power of two: where it is multiplied in shows
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MODULES = [
    f"model.layers.{i}.{part}.{name}"
    for i in range(2)
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name in names
]
HEAD, HEADS, KV_HEADS = 16, 4, 2
VOCAB = 96
Q, OUT, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
NORM, TOP = "model.norm.weight", "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


# The base and its adapters --------------------------------------------------------------------------------------------


def llama(tied: bool = False, seed: int = 0) -> Any:
    """Nothing in it is exactly zero or one: a lost bias or norm would not show."""
    torch.manual_seed(seed)
    config = T.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=VOCAB,
        num_key_value_heads=KV_HEADS, attention_bias=True, tie_word_embeddings=tied, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = T.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def tokenizer(words: int = VOCAB) -> Any:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w1", eos_token="w2", unk_token="w0")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value(kind: str, W: Tensor, size: float, seed: int) -> Adapter:
    """An adapter whose update has `size` of the base's norm; DoRA's magnitudes are off by a fifth of that."""
    out, in_ = W.shape
    rank = RANK if kind in PEFT_KINDS else RANK // 2
    A, B = normal(rank, in_, seed=seed), normal(out, rank, seed=seed + 1)
    C, D = normal(rank, in_, seed=seed + 2), normal(out, rank, seed=seed + 3)
    s = ALPHA / (rank**0.5 if kind == "rslora" else rank)
    B = B * (size * float(W.double().norm() / (s * B @ A).norm()))
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C, D=D, scaling=s)
    if kind == "d2lora":
        return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D * B.norm() / D.norm(), scaling=s)
    if kind == "dora":
        norms = (W.double() + s * (B.double() @ A.double())).norm(dim=1)
        magnitude = (norms * (1 + size / 5 * normal(out, seed=seed + 4))).float()
        return DoRA(A=A, B=B, scaling=s, magnitude=magnitude)
    return LoRA(A=A, B=B, scaling=s)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What an adapter has beside the factors of the linear modules."""

    only: tuple[str, ...] = (*ATTENTION, *MLP)
    targets: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # of LoraConfig
    more_rows: int = 0  # of the embedding
    model: Any = T.AutoModelForCausalLM
    along: Any = None  # of D2-LoRA


EXTRAS: dict[str, Extra] = {
    "": Extra(),
    "bias": Extra(options={"bias": "lora_only"}),
    "lora_bias": Extra(only=ATTENTION, options={"lora_bias": True}),
    "head": Extra(options={"modules_to_save": ["lm_head"]}),
    "norms": Extra(options={"modules_to_save": ["norm", "embed_tokens"]}),
    "rows": Extra(options={"trainable_token_indices": {"embed_tokens": [5, 7, 11]}}),
    "embedding": Extra(targets=("embed_tokens",)),
    "both sides": Extra(targets=("embed_tokens", "lm_head"), options={"ensure_weight_tying": True}),
    "more words": Extra(more_rows=8, options={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "classifier": Extra(
        model=T.AutoModelForSequenceClassification, options={"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    ),
    "rows' norm": Extra(along="out_features"),
}


def write_adapter(kind: str, base: Path, values: Mapping[str, Adapter], out: Path, extra: Extra) -> None:
    """By PEFT where PEFT has the kind."""
    if kind not in PEFT_KINDS:
        save(from_adapters(values), out)
        return
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[*sorted(values), *extra.targets], use_rslora=kind == "rslora",
        use_dora=kind == "dora", **{"task_type": "CAUSAL_LM", **extra.options},
    )  # fmt: skip
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about ties is not what is tested
        model = get_peft_model(load(base, extra=extra), config)
        for name, parameter in model.named_parameters():
            module, _, slot = name.removeprefix("base_model.model.").partition(".lora_")
            slot = slot.removesuffix(".default.weight").removesuffix("_vector")
            if module in values and slot in ("A", "B", "magnitude"):
                parameter.data.copy_(getattr(values[module], slot))
            elif parameter.requires_grad:  # a bias, a saved module, a row, an embedding's factor
                parameter.data.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(out, save_embedding_layers=False)
    if extra.more_rows:
        tokenizer(VOCAB + extra.more_rows).save_pretrained(out)


def load(directory: Path, dtype: Any = "auto", extra: Extra = EXTRAS[""]) -> Any:
    """The model at a directory, in the class and with the vocabulary of the training."""
    model = extra.model.from_pretrained(directory, dtype=dtype, local_files_only=True)
    if extra.more_rows:
        model.resize_token_embeddings(VOCAB + extra.more_rows, mean_resizing=False)
    return model


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def rewrite(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """The checkpoint with some tensors put in place, or taken away (None)."""
    kept = {name: t for name, t in {**tensors(directory), **changes}.items() if t is not None}
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file({name: t.contiguous() for name, t in kept.items()}, directory / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def rounded(values: Any, dtype: str) -> Tensor:
    """Numbers of long double, rounded once."""
    if dtype == "F32":
        return torch.from_numpy(np.asarray(values).astype(np.float32))
    return torch.from_numpy(round_to(np.asarray(values).astype(np.float64), dtype)).to(DTYPES[dtype])


@dataclass(frozen=True)
class Setting:
    """A base, an adapter and our merge of the two."""

    kind: str
    dtype: str
    base: Path
    adapter: Path
    healthy: Path
    values: Mapping[str, Adapter]
    extra: Extra

    def weights(self) -> dict[str, Tensor]:
        return tensors(self.base)

    def by(self, formula: "Formula", modules: list[str] | None = None) -> dict[str, Tensor]:
        """The adapted weights by a formula of the adapter and the base weight."""
        before = self.weights()
        chosen = [m for m in self.values if modules is None or m in modules]
        return {
            f"{m}.weight": rounded(formula(self.values[m], before[f"{m}.weight"]), self.dtype) for m in chosen
        }  # fmt: skip


Formula = Callable[[Any, Tensor], Any]
Change = Callable[[Setting, Path], None]


class World:
    """All settings, each made once, under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = cache(self._base)
        self.setting = cache(self._setting)

    def _base(self, dtype: str, tied: bool = False, grid: bool = False) -> Path:
        out = self.folder / f"base-{dtype}{'-tied' * tied}{'-grid' * grid}"
        model = llama(tied).to(DTYPES[dtype])
        if grid:  # as a dequantised QLoRA base
            for module in MODULES:
                weight = model.get_submodule(module).weight
                weight.data = four_bits(weight.data)
        model.save_pretrained(out)
        tokenizer().save_pretrained(out)
        return out

    def _setting(
        self, kind: str, dtype: str, size: float = 0.01, tied: bool = False, grid: bool = False, extra: str = ""
    ) -> Setting:
        base = self.base(dtype, tied, grid)
        before = tensors(base)
        values: dict[str, Any] = {
            m: value(kind, before[f"{m}.weight"], size, 10 * i)
            for i, m in enumerate(MODULES)
            if m.endswith(EXTRAS[extra].only)
        }  # fmt: skip
        name = f"{kind}-{dtype}-{size}{'-tied' * tied}{'-grid' * grid}{extra}".replace(" ", "-")
        adapter_at, healthy = self.folder / f"adapter-{name}", self.folder / f"merged-{name}"
        if (along := EXTRAS[extra].along) is not None:
            values = {module: replace(adapter, along=along) for module, adapter in values.items()}
        write_adapter(kind, base, values, adapter_at, EXTRAS[extra])
        merge(base, adapter_at, healthy)
        return Setting(kind, dtype, base, adapter_at, healthy, values, EXTRAS[extra])


# A case ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """`codes`: one of them must be among the reasons; an error outside `codes` and `also` is a wrong diagnosis.
    `where`: a part of the name of the module or tensor that a reason must give. `says`: a part of its message."""

    group: str
    name: str
    kind: str
    dtype: str
    change: Change
    verdict: str  # pass, fail, not pass (fail or inconclusive), refused
    codes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    where: str = ""
    says: str = ""
    exact: bool = False  # a recipe of the bank replays it with no differing element
    size: float = 0.01
    tied: bool = False
    grid: bool = False
    extra: str = ""

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name} [{self.kind} {self.dtype} {self.size:g}]"

    def setting(self, world: World) -> Setting:
        return world.setting(self.kind, self.dtype, self.size, self.tied, self.grid, self.extra)

    def build(self, world: World, out: Path) -> Setting:
        """The merged directory of this case, at `out`."""
        setting = self.setting(world)
        shutil.copytree(setting.healthy, out, dirs_exist_ok=True)
        (out / "d2surgery_merge.json").unlink(missing_ok=True)  # a receipt proves it by hash; here the weights must
        self.change(setting, out)
        return setting


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


# Mergers elsewhere ----------------------------------------------------------------------------------------------------

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


def resaved(shard: str = "5GB") -> Change:
    """Loaded and saved by transformers, which renames nothing but may reshard, retie and rewrite the config."""

    def change(setting: Setting, out: Path) -> None:
        model = load(out)
        for file in [*out.glob("*.safetensors*"), out / "config.json"]:
            file.unlink()
        model.save_pretrained(out, max_shard_size=shard)

    return change


# What goes wrong ------------------------------------------------------------------------------------------------------


def four_bits(W: Tensor) -> Tensor:
    """The nearest of sixteen levels per block of 64, as nf4 does it."""
    levels = torch.tensor(
        [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
         0.7230, 1]
    )  # fmt: skip
    blocks = W.float().reshape(-1, 32)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(W.shape).to(W.dtype)


def eight_bits(W: Tensor) -> Tensor:
    step = W.float().abs().amax(1, keepdim=True) / 127
    return ((W.float() / step).round() * step).to(W.dtype)


def requantised(f: Callable[[Tensor], Tensor]) -> Change:
    def change(setting: Setting, out: Path) -> None:
        found = tensors(out)
        rewrite(out, {f"{m}.weight": f(found[f"{m}.weight"]) for m in setting.values})

    return change


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


# The cases ------------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [
        *_ours(), *_pefts(), *_elsewhere(), *_kept(), *_strengths(), *_formulas(), *_by_kind(), *_heads(), *_parts(),
        *_replaced(), *_ties(), *_beside(), *_grids(), *_small(), *_damage(), *_single(),
    ]  # fmt: skip


def part(whole: list[Case]) -> list[Case]:
    """About half: everything healthy, and each failure for a quarter of its kinds and dtypes, at least two."""
    alike: dict[tuple[str, str], list[Case]] = {}
    for case in whole:
        alike.setdefault((case.group, case.name), []).append(case)
    kept: list[Case] = []
    for number, same in enumerate(alike.values()):
        few = same if same[0].group == "healthy" or len(same) < 3 else same[number % 4 :: 4]
        kept += few if len(few) > 1 else same[:2]
    return kept


def _every(kinds: tuple[str, ...] = KINDS, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[dict[str, Any]]:
    yield from ({"kind": kind, "dtype": dtype} for kind in kinds for dtype in dtypes)


def _rotated(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """Some kind and dtype for each failure that depends on neither."""
    every = list(_every())
    yield from (every[(start + 7 * i) % len(every)] for i in range(count))


def _ours() -> Iterator[Case]:
    for at in _every():
        yield Case(group="healthy", name="our merge", change=nothing, verdict="pass", exact=True, **at)
        yield Case(group="healthy", name="float64, rounded once", change=formula(effective), verdict="pass", **at)
    for kind in KINDS:
        for dtype in ("BF16", "F16"):

            def cast(setting: Setting, out: Path, dtype: str = dtype) -> None:
                shutil.rmtree(out)
                merge(setting.base, setting.adapter, out, dtype=dtype)
                (out / "d2surgery_merge.json").unlink()

            name = f"our merge, written as {dtype}"
            yield Case(group="healthy", name=name, kind=kind, dtype="F32", change=cast, verdict="pass", exact=True)


def _pefts() -> Iterator[Case]:
    healthy: dict[str, Any] = {"group": "healthy", "verdict": "pass", "exact": True}
    for at in _every(PEFT_KINDS):
        yield Case(name="PEFT", change=peft_merge(safe=False), **healthy, **at)
        yield Case(name="PEFT safe_merge", change=peft_merge(safe=True), **healthy, **at)
    for at in _every(PEFT_KINDS, ("BF16", "F16")):
        yield Case(name="PEFT in float32, then cast", change=peft_merge(safe=False, compute="F32"), **healthy, **at)
        yield Case(name="PEFT, adapter in 16 bits", change=peft_merge(safe=False, autocast=False), **healthy, **at)


def _elsewhere() -> Iterator[Case]:
    for name, (f, kinds) in ELSEWHERE.items():
        for at in _every(kinds, ("F32", "BF16")):
            yield Case(group="healthy", name=f"as {name}", change=arithmetic(f), verdict="pass", **at)


def _kept() -> Iterator[Case]:
    healthy: dict[str, Any] = {"group": "healthy", "verdict": "pass"}
    changes: dict[str, Change] = {
        "saved again by transformers": resaved(),
        "in small shards": resaved("40KB"),
        "the config names the version that saved it": config(transformers_version="9.9.9", _name_or_path="/x"),
    }
    for (name, change), at in zip(changes.items(), _rotated(3), strict=True):
        yield Case(name=name, change=change, **healthy, **at)
        yield Case(name=f"tied, {name}", change=change, tied=True, **healthy, **at)
    yield Case(name="tied", kind="lora", dtype="BF16", change=nothing, tied=True, **healthy)
    yield Case(name="tied, head written out", kind="d2lora", dtype="F32", change=tied_once_more, tied=True, **healthy)
    for extra in ("bias", "lora_bias", "head", "norms", "rows", "embedding", "more words"):
        for dtype in ("F32", "BF16"):
            at = {"kind": "lora", "dtype": dtype, "extra": extra}
            yield Case(name=f"adapter with {extra}", change=nothing, **healthy, **at)
            yield Case(name=f"PEFT, adapter with {extra}", change=peft_merge(safe=False), **healthy, **at)
            yield Case(name=f"tied, adapter with {extra}", change=nothing, tied=True, **healthy, **at)
    for extra, tied in (("both sides", True), ("classifier", True), ("classifier", False)):
        name = f"{'tied, ' * tied}adapter with {extra}"
        yield Case(name=name, kind="lora", dtype="F32", extra=extra, tied=tied, change=nothing, **healthy)
    for dtype in DTYPES:
        yield Case(name="norm of the rows", kind="d2lora", dtype=dtype, extra="rows' norm", change=nothing, **healthy)
    yield Case(name="PEFT's classifier, its base tied", kind="lora", dtype="F32", extra="classifier", tied=True,
               change=peft_merge(safe=False), **healthy)  # fmt: skip


WRONG = ("WRONG_STRENGTH",)
DOUBLE = ("DELTA_APPLIED_TWICE", "WRONG_STRENGTH")


def _strengths() -> Iterator[Case]:
    for at in _every():
        for factor in (0.9, 1.1, 0.96, 1.04):
            yield Case(
                group="strength", name=f"{factor:g}", change=formula(strength(factor)), codes=WRONG,
                verdict="fail" if at["dtype"] == "F32" or abs(factor - 1) > 0.05 else "not pass",
                also=("STRENGTH_UNCERTAIN",), **at,
            )  # fmt: skip
    for kind in KINDS:
        for factor in (0.99, 1.01, 0.995, 1.005):
            change = formula(strength(factor))
            yield Case(
                group="strength", name=f"{factor:g}", kind=kind, dtype="F32", change=change, codes=WRONG, verdict="fail"
            )
    for factor in (0.5, 1.005):
        change = formula(strength(factor))
        yield Case(group="strength", name=f"{factor:g}, small delta", kind="lora", dtype="F32", size=0.001,
                   change=change, codes=WRONG, verdict="fail")  # fmt: skip
    for dtype in DTYPES:
        yield Case(group="strength", name="0.8 in one module", kind="lora", dtype=dtype, codes=WRONG, where=OUT,
                   change=formula(strength(0.8), [OUT]), verdict="fail")  # fmt: skip
    yield Case(group="strength", name="1.01 in one module", kind="dora", dtype="F32", codes=WRONG, where=OUT,
               change=formula(strength(1.01), [OUT]), verdict="fail")  # fmt: skip


def _formulas() -> Iterator[Case]:
    for at in _every():
        fail: dict[str, Any] = {"verdict": "fail", **at}
        yield Case(group="not applied", name="all", change=base_again(), codes=("DELTA_NOT_APPLIED",), **fail)
        yield Case(group="twice", name="merged again", change=formula(twice), codes=("DELTA_APPLIED_TWICE",), **fail)
        yield Case(group="twice", name="onto the merged file", change=merged_onto_merged, **fail,
                   codes=("DELTA_APPLIED_TWICE",))  # fmt: skip
        yield Case(group="twice", name="2·delta", change=formula(strength(2)), codes=DOUBLE, **fail)
        yield Case(group="sign", name="−delta", change=formula(strength(-1)), codes=("SIGN_FLIPPED",), **fail)
        yield Case(group="alpha", name="×0.5", change=formula(scaled(0.5)), codes=WRONG, **fail)
        yield Case(group="alpha", name="×2", change=formula(scaled(2)), codes=DOUBLE, **fail)
        yield Case(group="transposed", name="square modules", change=formula(transposed, [Q, OUT]),
                   codes=("DELTA_TRANSPOSED",), where="proj", **fail)  # fmt: skip
    for at in _every(("lora", "dora")):
        change = formula(scaled(-1))
        yield Case(group="sign", name="−alpha", change=change, codes=("SIGN_FLIPPED",), verdict="fail", **at)
    for at in _every(PEFT_KINDS):
        root = RANK**0.5
        change = formula(scaled(1 / root if at["kind"] == "rslora" else root))
        yield Case(group="alpha", name="√r", change=change, codes=WRONG, says="√", verdict="fail", **at)
    for noise, at in zip((0.3, 0.05, 0.003, None, 0.01, 0.003, None, 0.02), _rotated(8), strict=True):
        name = "another model" if noise is None else f"off by {100 * noise:g} %"
        yield Case(group="wrong base", name=name, change=other_base(noise), codes=("WRONG_BASE",), verdict="fail",
                   also=("TENSOR_CHANGED", "BIAS_FORGOTTEN"), **at)  # fmt: skip


def _by_kind() -> Iterator[Case]:
    unexplained = ("DELTA_UNEXPLAINED", "ROUNDING_EXCESS")
    table: list[tuple[str, str, str, Change, tuple[str, ...], str]] = [
        ("d2lora", "branch", "minus missing", formula(with_fields(tau=0.0)), ("BRANCH_MISSING",), "minus"),
        ("d2lora", "branch", "plus missing", formula(no_plus), ("BRANCH_MISSING",), "plus"),
        ("d2lora", "branch", "minus added", formula(with_fields(tau=-0.5)), ("SIGN_FLIPPED",), "minus"),
        ("d2lora", "branch", "τ = 1", formula(with_fields(tau=1.0)), (*unexplained, "BRANCH_MISSING", *WRONG), ""),
        ("d2lora", "projection", "update alone", formula(with_fields(form="update")), ("PROJECTION_MISSING",), ""),
        ("d2lora", "projection", "W* alone", formula(with_fields(form="projected")), ("PROJECTION_MISSING",), ""),
        ("d2lora", "axis", "norm of the rows", formula(other_axis), ("WRONG_AXIS",), ""),
        ("duallora", "direction", "ReLU alone", formula(no_direction), ("DIRECTION_MISSING",), ""),
        ("duallora", "direction", "no ReLU", formula(no_relu), ("DIRECTION_MISSING",), "ReLU"),
        ("dora", "magnitude", "dropped", formula(no_magnitude), ("MAGNITUDE_DROPPED",), ""),
        ("dora", "magnitude", "untrained", formula(first_magnitude), ("MAGNITUDE_DROPPED", *unexplained), ""),
        ("dora", "magnitude", "norm of the base", formula(stale_norm), (*unexplained, "MAGNITUDE_DROPPED", *WRONG), ""),
        ("dora", "axis", "square modules", formula(other_axis, [Q, OUT]), ("WRONG_AXIS",), ""),
        ("lora", "rank", "half of it", formula(half_rank), (*unexplained, *WRONG), ""),
        ("lora", "layers", "one too deep", next_layer, unexplained, ""),
    ]
    for kind, group, name, change, codes, says in table:
        for dtype in DTYPES:
            yield Case(group=group, name=name, kind=kind, dtype=dtype, change=change, codes=codes, says=says,
                       verdict="not pass" if name == "norm of the base" else "fail")  # fmt: skip


def _heads() -> Iterator[Case]:
    for how, at in zip(("rotary", "delta", "heads") * 3, _rotated(9, 1), strict=True):
        yield Case(group="heads", name=how, change=heads_permuted(how), codes=("HEADS_PERMUTED",), verdict="fail",
                   where="_proj", **at)  # fmt: skip


def _parts() -> Iterator[Case]:
    part: dict[str, Any] = {"group": "partial", "verdict": "fail", "also": ("PARTIAL_MERGE",)}
    second = [f"{m}.weight" for m in MODULES if ".1." in m]
    mlps = [f"{m}.weight" for m in MODULES if ".mlp." in m]
    for at in _every():
        yield Case(
            name="one module", change=base_again(f"{OUT}.weight"), codes=("DELTA_NOT_APPLIED",), where=OUT, **part, **at
        )
    for kind in KINDS:
        at = {"kind": kind, "dtype": "BF16"}
        yield Case(name="one layer of two", change=base_again(*second), codes=("PARTIAL_MERGE",),
                   **{**part, "also": ("DELTA_NOT_APPLIED",)}, **at)  # fmt: skip
    yield Case(name="the MLPs", kind="lora", dtype="F32", change=base_again(*mlps), codes=("PARTIAL_MERGE",),
               **{**part, "also": ("DELTA_NOT_APPLIED",)})  # fmt: skip
    yield Case(name="one module, small delta", kind="lora", dtype="BF16", size=0.001, where=OUT,
               change=base_again(f"{OUT}.weight"), codes=("DELTA_NOT_APPLIED",), **part)  # fmt: skip
    yield Case(name="one module twice", kind="dora", dtype="BF16", change=formula(twice, [DOWN]),
               codes=("DELTA_APPLIED_TWICE",), where=DOWN, **part)  # fmt: skip


def _replaced() -> Iterator[Case]:
    for dtype in DTYPES:
        fail: dict[str, Any] = {"group": "forgotten", "kind": "lora", "dtype": dtype, "verdict": "fail"}
        biases = [f"{m}.bias" for m in MODULES if ".self_attn." in m]
        replaced = ("REPLACEMENT_FORGOTTEN",)
        yield Case(name="biases", extra="bias", change=base_again(*biases), codes=("BIAS_FORGOTTEN",), **fail)
        yield Case(name="one bias", extra="lora_bias", change=base_again(f"{Q}.bias"), codes=("BIAS_FORGOTTEN",),
                   where=Q, **fail)  # fmt: skip
        yield Case(name="saved head", extra="head", change=base_again(TOP), codes=replaced, where="lm_head", **fail)
        yield Case(name="saved norm", extra="norms", change=base_again(NORM), codes=replaced, where="norm", **fail)
        yield Case(name="token rows", extra="rows", change=base_again(EMBEDDING), codes=replaced, where="embed", **fail)
        one_row = tensor(EMBEDDING, lambda t: torch.cat([t[:50], t[50:51] * 2, t[51:]]))
        yield Case(name="another row changed too", extra="rows", change=one_row, codes=("TENSOR_CHANGED",),
                   where="embed", **fail)  # fmt: skip
        noise = tensor(TOP, lambda t: t + 0.01 * normal(*t.shape, seed=4).to(t.dtype))
        yield Case(name="saved head and noise", extra="head", change=noise, codes=("TENSOR_CHANGED",), where="lm_head",
                   **fail)  # fmt: skip


def _ties() -> Iterator[Case]:
    tied: dict[str, Any] = {"tied": True, "verdict": "fail", "group": "ties", "kind": "lora"}
    ties = ("TIE_DOUBLED", "TENSOR_MISSING", "CONFIG_CHANGED")
    yield Case(name="PEFT adds to both sides", extra="both sides", dtype="F32", change=peft_merge(safe=False),
               codes=("TIE_DOUBLED",), **tied)  # fmt: skip
    for dtype in ("F32", "BF16"):
        yield Case(name="PEFT adds the embedding's to the head too", extra="embedding", dtype=dtype,
                   change=peft_merge(safe=False), codes=ties, also=ties, **tied)  # fmt: skip
        yield Case(name="head untied, and not the base's", extra="embedding", dtype=dtype,
                   change=tensor(TOP, lambda t: 1.5 * t), codes=("TENSOR_CHANGED",), where="lm_head",
                   **tied)  # fmt: skip
        yield Case(name="tied head written out otherwise", dtype=dtype,
                   change=lambda s, out: rewrite(out, {TOP: 1.5 * tensors(out)[EMBEDDING]}),
                   codes=("TENSOR_EXTRA", "TENSOR_CHANGED"), where="lm_head", **tied)  # fmt: skip
    yield Case(name="score forgotten", extra="classifier", dtype="F32", change=tensor("score.weight", lambda t: None),
               codes=("REPLACEMENT_FORGOTTEN", "TENSOR_MISSING"), where="score", **tied)  # fmt: skip


def _beside() -> Iterator[Case]:
    changed, missing, other = ("TENSOR_CHANGED",), ("TENSOR_MISSING",), ("CONFIG_CHANGED",)
    table: list[tuple[str, str, Change, tuple[str, ...], str]] = [
        ("tensors", "norm deleted", tensor(NORM, lambda t: None), missing, "norm"),
        ("tensors", "norm zeroed", tensor(NORM, torch.zeros_like), changed, "norm"),
        ("tensors", "norm doubled", tensor(NORM, lambda t: 2 * t), changed, "norm"),
        ("tensors", "norm off by one ulp", one_ulp(NORM, (7,)), changed, "norm"),
        ("tensors", "head randomised", tensor(TOP, lambda t: 0.02 * normal(*t.shape, seed=5).to(t.dtype)), changed,
         "lm_head"),
        ("tensors", "head deleted", tensor(TOP, lambda t: None), missing, "lm_head"),
        ("tensors", "embedding off by one ulp", one_ulp(EMBEDDING, (3, 4)), changed, "embed"),
        ("tensors", "adapted weight deleted", tensor(f"{Q}.weight", lambda t: None), missing, Q),
        ("tensors", "adapted weight short of a row", tensor(f"{Q}.weight", lambda t: t[:-1]), ("TENSOR_RESIZED",), Q),
        ("tensors", "embedding with eight more rows",
         both(tensor(EMBEDDING, lambda t: torch.cat([t, t[:8]])), tensor(TOP, lambda t: torch.cat([t, t[:8]])),
              config(vocab_size=VOCAB + 8)), ("TENSOR_RESIZED",), ""),
        ("tensors", "unknown tensor", lambda s, out: rewrite(out, {"model.secret.weight": torch.ones(3, 3)}),
         ("TENSOR_EXTRA",), "secret"),
        ("tensors", "adapter left beside", lambda s, out: rewrite(out, {f"{Q}.lora_A.weight": torch.ones(8, 64)}),
         ("TENSOR_EXTRA",), "lora_A"),
        ("tensors", "NaN in an adapted weight", tensor(f"{Q}.weight", not_finite), ("NOT_FINITE",), Q),
        ("tensors", "NaN in the embedding", tensor(EMBEDDING, not_finite), ("NOT_FINITE", "TENSOR_CHANGED"), "embed"),
        ("config", "rope_theta", config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), other, ""),
        ("config", "tie flag", config(tie_word_embeddings=True), other, ""),
        ("config", "vocab_size", config(vocab_size=128), other, ""),
        ("config", "norm epsilon", config(rms_norm_eps=1e-3), other, ""),
        ("config", "heads", config(num_attention_heads=8, head_dim=8), other, ""),
        ("config", "quantisation named", config(quantization_config={"quant_method": "bitsandbytes"}), other, ""),
        ("config", "gone", lambda s, out: (out / "config.json").unlink(), other, ""),
        ("tokenizer", "two words swapped", tokenizer_changed, ("TOKENIZER_CHANGED",), ""),
        ("tokenizer", "gone", tokenizer_gone, ("TOKENIZER_CHANGED",), ""),
    ]  # fmt: skip
    allowed = ("TENSOR_CHANGED", "CONFIG_CHANGED", "TOKENIZER_CHANGED", "NOT_FINITE", "TENSOR_RESIZED")
    for i, (group, name, change, codes, where) in enumerate(table):
        for at in _rotated(2, i):
            yield Case(
                group=group, name=name, change=change, codes=codes, also=allowed, where=where, verdict="fail", **at
            )
    # A warning: it says how to sample, and every saver rewrites it.
    yield Case(group="config", name="generation config", kind="lora", dtype="F32", change=generation_config,
               codes=other, verdict="pass")  # fmt: skip
    yield Case(group="tensors", name="NaN everywhere in one module", kind="d2lora", dtype="BF16", where=OUT,
               change=tensor(f"{OUT}.weight", lambda t: t * torch.nan), codes=("NOT_FINITE",),
               verdict="fail")  # fmt: skip
    refused: list[tuple[str, Change, tuple[str, ...]]] = [
        ("truncated shard", truncated, ("TRUNCATED_FILE",)),
        ("missing shard", shard_gone, ("MISSING_SHARD",)),
        ("no weights at all", lambda s, out: (out / "model.safetensors").unlink(), ("BAD_MERGED",)),
    ]
    for (name, change, codes), at in zip(refused, _rotated(3, 2), strict=True):
        yield Case(group="unreadable", name=name, change=change, codes=codes, verdict="refused", **at)


def _grids() -> Iterator[Case]:
    grid: dict[str, Any] = {"group": "requantised", "codes": ("REQUANTIZED",), "verdict": "fail"}
    for at in _every(KINDS, ("BF16",)):
        yield Case(name="nf4", change=requantised(four_bits), **grid, **at)
        yield Case(name="int8 per row", change=requantised(eight_bits), **grid, **at)
    yield Case(name="nf4", kind="lora", dtype="F32", change=requantised(four_bits), **grid)
    yield Case(name="int8 per row", kind="dora", dtype="F16", change=requantised(eight_bits), **grid)
    for at in _every(("lora", "d2lora"), ("F32", "BF16")):
        yield Case(group="healthy", name="base on a 4-bit grid", change=nothing, grid=True, verdict="pass", **at)
        yield Case(group="requantised", name="base on a 4-bit grid, back on it", grid=True, verdict="fail",
                   change=requantised(four_bits), codes=("REQUANTIZED", "DELTA_NOT_APPLIED"), **at)  # fmt: skip


def _small() -> Iterator[Case]:
    for kind in KINDS:
        for size in (0.001, 0.0003):
            at: dict[str, Any] = {"kind": kind, "dtype": "BF16", "size": size}
            low: dict[str, Any] = {"group": "healthy", "verdict": "pass", "codes": ("LOW_SURVIVAL",)}
            if kind != "d2lora" or size < 0.001:  # D2 adds about twice its update
                yield Case(name="small delta", change=nothing, **low, **at)
            if kind in PEFT_KINDS:
                yield Case(name="small delta, PEFT", change=peft_merge(safe=False), **low, **at)
            yield Case(group="not applied", name="small delta", change=base_again(), codes=("DELTA_NOT_APPLIED",),
                       also=("LOW_SURVIVAL",), verdict="fail", **at)  # fmt: skip
            yield Case(group="twice", name="small delta", change=merged_onto_merged, codes=("DELTA_APPLIED_TWICE",),
                       also=("LOW_SURVIVAL",), verdict="fail", **at)  # fmt: skip
            yield Case(group="sign", name="small delta", change=formula(strength(-1)), codes=("SIGN_FLIPPED",),
                       also=("LOW_SURVIVAL",), verdict="fail", **at)  # fmt: skip


def _damage() -> Iterator[Case]:
    """λ̂ stays 1, or nearly, and still it is not the merge."""
    wrong: dict[str, Any] = {
        "group": "damage", "codes": ("DELTA_UNEXPLAINED", "ROUNDING_EXCESS", "STRENGTH_UNCERTAIN"),
        "where": DOWN, "verdict": "fail",
        "also": ("WRONG_STRENGTH", "PARTIAL_MERGE", "DELTA_NOT_APPLIED"),
    }  # fmt: skip
    weight = f"{DOWN}.weight"
    table: list[tuple[str, Change, str]] = [
        ("one element of ten", damaged(weight, (3, 5), lambda t: torch.full_like(t, 10)), "fail"),
        ("one element doubled", damaged(weight, (3, 5), lambda t: 2 * t), "fail"),
        ("one sign turned", damaged(weight, (3, 5), torch.neg), "fail"),
        ("one row zeroed", damaged(weight, 7, torch.zeros_like), "fail"),
        ("one column zeroed", damaged(weight, (slice(None), 7), torch.zeros_like), "fail"),
        ("two rows swapped", damaged(weight, [7, 8], lambda t: t.flip(0)), "fail"),
        ("one row as in the base", rows_of_the_base(DOWN, 1), "not pass"),
        ("a quarter of the rows as in the base", rows_of_the_base(DOWN, 16), "fail"),
        ("noise, half of the delta", formula(noisy(0.5), [DOWN]), "fail"),
        ("an earlier step, off by 20 %", formula(another_step(0.2), [DOWN]), "fail"),
        ("an earlier step, off by 5 %", formula(another_step(0.05), [DOWN]), "not pass"),
    ]
    for name, change, verdict in table:
        for at in _every(("lora", "d2lora"), ("F32", "BF16")):
            yield Case(name=name, change=change, **{**wrong, "verdict": verdict}, **at)
    for at in _every(KINDS, ("F32",)):
        for name, change in (
            ("noise, a hundredth of the delta", formula(noisy(0.01), [DOWN])),
            ("an earlier step, off by 1 %", formula(another_step(0.01), [DOWN])),
            ("one element off by 1 %", damaged(weight, (3, 5), lambda t: 1.01 * t)),
        ):
            yield Case(name=name, change=change, **{**wrong, "verdict": "not pass"}, **at)
    for at in _every(("dora", "duallora"), ("BF16", "F16")):
        yield Case(
            name="an earlier step, every module", change=formula(another_step(0.2)), **{**wrong, "where": ""}, **at
        )


def _single() -> Iterator[Case]:
    """One unit in the last place of one element of an adapted tensor: within rounding, and said so."""
    for at in _every():
        yield Case(group="one ulp", name="in an adapted weight", change=one_ulp(f"{Q}.weight", (3, 7)),
                   codes=("OTHER_ROUNDING",), where=Q, verdict="pass", **at)  # fmt: skip
