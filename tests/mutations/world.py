"""The base, the adapters of every kind that are merged into it, and our merge of each, made once."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from models import round_to
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.checkpoint import from_adapters, save
from d2surgery.merging import merge
from mutations.weights import realistic

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


def llama(tied: bool = False, seed: int = 0, real: bool = False) -> Any:
    """Nothing in it is exactly zero or one: a lost bias or norm would not show. real: twice as wide, with weights as
    trained models have them."""
    torch.manual_seed(seed)
    config = T.LlamaConfig(
        hidden_size=128 if real else 64, intermediate_size=192 if real else 96, head_dim=32 if real else HEAD,
        num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=VOCAB,
        num_key_value_heads=KV_HEADS, attention_bias=True, tie_word_embeddings=tied, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = T.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif real and "proj" in name:
                parameter.copy_(realistic(*parameter.shape, len(name) + int(parameter[0, 0] > 0)))
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

    def _base(self, dtype: str, tied: bool = False, grid: bool = False, real: bool = False) -> Path:
        out = self.folder / f"base-{dtype}{'-tied' * tied}{'-grid' * grid}{'-real' * real}"
        model = llama(tied, real=real).to(DTYPES[dtype])
        if grid:  # as a dequantised QLoRA base
            for module in MODULES:
                weight = model.get_submodule(module).weight
                weight.data = four_bits(weight.data)
        model.save_pretrained(out)
        tokenizer().save_pretrained(out)
        return out

    def _setting(
        self, kind: str, dtype: str, size: float = 0.01, tied: bool = False, grid: bool = False, extra: str = "",
        real: bool = False,
    ) -> Setting:  # fmt: skip
        base = self.base(dtype, tied, grid, real)
        before = tensors(base)
        values: dict[str, Any] = {
            m: value(kind, before[f"{m}.weight"], size, 10 * i)
            for i, m in enumerate(MODULES)
            if m.endswith(EXTRAS[extra].only)
        }  # fmt: skip
        name = f"{kind}-{dtype}-{size}{'-tied' * tied}{'-grid' * grid}{'-real' * real}{extra}".replace(" ", "-")
        adapter_at, healthy = self.folder / f"adapter-{name}", self.folder / f"merged-{name}"
        if (along := EXTRAS[extra].along) is not None:
            values = {module: replace(adapter, along=along) for module, adapter in values.items()}
        write_adapter(kind, base, values, adapter_at, EXTRAS[extra])
        merge(base, adapter_at, healthy)
        return Setting(kind, dtype, base, adapter_at, healthy, values, EXTRAS[extra])


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
    real: bool = False

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name} [{self.kind} {self.dtype} {self.size:g}]"

    def setting(self, world: World) -> Setting:
        return world.setting(self.kind, self.dtype, self.size, self.tied, self.grid, self.extra, self.real)

    def build(self, world: World, out: Path) -> Setting:
        """The merged directory of this case, at `out`."""
        setting = self.setting(world)
        shutil.copytree(setting.healthy, out, dirs_exist_ok=True)
        (out / "d2surgery_merge.json").unlink(missing_ok=True)  # a receipt proves it by hash; here the weights must
        self.change(setting, out)
        return setting
