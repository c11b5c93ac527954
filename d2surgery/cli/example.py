"""What `d2surgery demo` makes and goes through: a base, an adapter of each kind, and each of these on the way."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from d2surgery.adapters import KINDS, Adapter, DoRA
from d2surgery.auditing import audit
from d2surgery.checkpoint import Checkpoint, from_adapters, load, save
from d2surgery.cli import output
from d2surgery.cli.audit import describe as describe_audit
from d2surgery.cli.inspect import describe
from d2surgery.cli.surgical import error_in_words
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import rounded
from d2surgery.formats import open_layout
from d2surgery.formats.layout import About
from d2surgery.kinds import TABLE
from d2surgery.machine import one_thread
from d2surgery.measures.fidelity import Survival
from d2surgery.merging import merge, plan
from d2surgery.surgery.choices import Keep
from d2surgery.surgery.resizing import convert

SEED = 20260214
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY, RANK = 256, 688, 4, 4, 1024, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


class Outcome(NamedTuple):
    kind: str
    survival: Survival
    wrong: int  # elements other than the float64 formula, rounded
    verdict: str
    seconds: float


def run(out: Path | None) -> None:
    """All of it, into this new directory or one that is gone again at the end; prints as it goes."""
    with ExitStack() as stack:
        work = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="d2surgery-")))
        stack.enter_context(
            one_thread()
        )  # matrices of this size are too small for more: several times slower on a busy machine
        base = work / "base"
        base.mkdir(parents=True)
        _make_base(base)
        outcomes = [_one(kind, base, work) for kind in KINDS]
        for line in _summary(outcomes):
            output.emit(line)
        for line in _broken(base, work / "dora", work / "merged-dora", work / "merged-broken"):
            output.emit(line)
        for line in _as_lora(base, work / "dora", work / "dora-as-lora"):
            output.emit(line)
        for line in _report(base, [work / kind for kind in KINDS], work / "report.html", kept=out is not None):
            output.emit(line)
        output.emit(f"Kept in {out}." if out else "The files are gone again; --out DIR keeps them.")


def _make_base(directory: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator)}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = 0.03 * torch.randn(shape, generator=generator)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    save_file({k: v.bfloat16() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))


def _one(kind: str, base: Path, work: Path) -> Outcome:
    """Make, inspect, plan, merge and check one kind."""
    began = time.monotonic()
    weights = BaseWeights(base)
    checkpoint = _trained(kind, weights)
    adapter, merged = work / kind, work / f"merged-{kind}"
    save(checkpoint, adapter)
    for line in describe(open_layout(adapter)):
        output.emit(line)
    forecast = plan(base, adapter, merged)
    merge(base, adapter, merged)
    output.emit("")
    return Outcome(
        kind,
        sum((by_dtype["BF16"] for by_dtype in forecast.survival.values()), Survival()),
        sum(_wrong(checkpoint, weights, BaseWeights(merged))),
        audit(base, adapter, merged).verdict,
        time.monotonic() - began,
    )


def _trained(kind: str, weights: BaseWeights) -> Checkpoint:
    """Factors of about the size that a short training leaves: an update of one to two per cent of the base."""
    generator = torch.Generator().manual_seed(SEED)
    adapters: dict[str, Adapter] = {}
    for name in weights:
        if "_proj" in name:
            base_weight = weights[name].float()
            fresh = KINDS[kind].init(base_weight, rank=RANK, scaling=2.0, generator=generator)
            adapters[name.removesuffix(".weight")] = _moved(fresh, generator)
    return from_adapters(adapters, About(base_model="d2surgery/demo", task="CAUSAL_LM"))


def _moved(fresh: Adapter, generator: torch.Generator) -> Adapter:
    """As if trained: the up factors leave zero, magnitudes move by one per cent."""
    moved: dict[str, Any] = {}
    for slot, tensor in fresh.slots().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if slot == "magnitude":
            moved[slot] = tensor * (1 + 0.01 * noise)
        elif not tensor.any():
            moved[slot] = 0.003 * noise
    return replace(fresh, **moved)


def _wrong(checkpoint: Checkpoint, base: BaseWeights, merged: BaseWeights) -> Iterator[int]:
    """Per module, the elements that are not the float64 formula on the whole matrix, rounded."""
    for module, adapter in checkpoint.items():
        name = f"{module}.weight"
        base_weight = base[name].double()
        exact = base_weight + adapter.to(dtype=torch.float64).delta(base_weight)
        yield int((rounded(exact, torch.bfloat16) != merged[name]).sum())


def _broken(base: Path, adapter: Path, merged: Path, broken: Path) -> Iterator[str]:
    """A merge as PEFT's convert_to_lora would make it in one layer: DoRA without its magnitude."""
    shutil.copytree(merged, broken)
    weights, checkpoint = BaseWeights(base), load(adapter)
    tensors = dict(BaseWeights(merged))
    for module, dora in checkpoint.items():
        if isinstance(dora, DoRA) and ".layers.1.self_attn." in module:
            name = f"{module}.weight"
            tensors[name] = (weights[name].double() + dora.update().dense()).bfloat16()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    yield ""
    yield "the DoRA merge again, one layer's attention without the magnitudes, audited:"
    yield from describe_audit(audit(base, adapter, broken))


def _as_lora(base: Path, adapter: Path, out: Path) -> Iterator[str]:
    """The DoRA as a plain LoRA of twice the rank, for engines that know no other."""
    made, certificate = convert(load(adapter), "lora", BaseWeights(base), keep=Keep(rank=2 * RANK))
    save(made, out)
    yield ""
    yield f"the DoRA as a LoRA of rank {2 * RANK}: {error_in_words(certificate)}"
    yield "  as its magnitudes move dense rows, no small rank is exact; on a base of its own (--rescale-base) only the"
    yield "  base's rounding is lost"


def _report(base: Path, adapters: Sequence[Path], path: Path, *, kept: bool) -> Iterator[str]:
    from d2surgery.verbs.reporting import report  # plotly

    began = time.monotonic()
    report(*adapters, base=base, out=path, force=True)
    where = f": open {path} in a browser" if kept else ""
    yield ""
    yield f"report of the four, {output.size(path.stat().st_size)} in {time.monotonic() - began:.1f} s{where}"


def _summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "merged in bf16, against the formula in float64:"
    rows = [["kind", "kept by rounding", "elements rounded otherwise", "audit", "seconds"]]
    for kind, survival, wrong, verdict, seconds in outcomes:
        kept = f"{100 * survival.gain:.1f} %"
        rows.append([TABLE[kind].title, kept, f"{wrong} of {survival.elements}", verdict, f"{seconds:.1f}"])
    yield from output.table(rows)
    yield "Rounding otherwise is by one unit in the last place, where float32 and float64 fall on two sides of a tie."
