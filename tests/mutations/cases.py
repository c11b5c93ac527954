"""The cases: what was done, and what an audit must say of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kinds import effective

from d2surgery.merging import merge
from mutations.changes import (
    another_checkpoint,
    another_seed,
    another_step,
    base_again,
    both,
    config,
    cut_off,
    damaged,
    eight_bits,
    first_magnitude,
    float8,
    formula,
    generation_config,
    half_rank,
    heads_permuted,
    integers,
    magnitudes,
    merged_onto_merged,
    next_layer,
    no_direction,
    no_magnitude,
    no_plus,
    no_relu,
    noisy,
    not_finite,
    nothing,
    one_ulp,
    other_axis,
    other_base,
    requantised,
    resaved,
    rows_of_the_base,
    scaled,
    shaped,
    shard_gone,
    stale_norm,
    strength,
    tensor,
    tied_once_more,
    tokenizer_changed,
    tokenizer_gone,
    transposed,
    truncated,
    twice,
    two_of_four,
    with_fields,
)
from mutations.elsewhere import ELSEWHERE, arithmetic, peft_merge
from mutations.installed import Merged, installed
from mutations.shapes import SHAPES
from mutations.world import (
    DOWN,
    DTYPES,
    EMBEDDING,
    KINDS,
    MODULES,
    NORM,
    OUT,
    PEFT_KINDS,
    RANK,
    TOP,
    VOCAB,
    Case,
    Change,
    Q,
    Setting,
    four_bits,
    normal,
    rewrite,
    tensors,
)


def cases() -> list[Case]:
    return [
        *_ours(), *_pefts(), *_elsewhere(), *_kept(), *_strengths(), *_formulas(), *_by_kind(), *_heads(), *_parts(),
        *_replaced(), *_ties(), *_beside(), *_grids(), *_small(), *_damage(), *_single(),
        *_shapes(), *_others(), *_more_grids(), *_magnitudes(), *installed(),
    ]  # fmt: skip


def part(whole: list[Case]) -> list[Case]:
    """About a fifteenth: an eighth of the kinds and dtypes of what is healthy, without most modes of what installs; one
    of each shape of damage, an eighth of these in all modules; a sixteenth of each other failure, and at least one."""
    alike: dict[tuple[str, str], list[Case]] = {}
    for case in whole:
        alike.setdefault((case.group, case.name), []).append(case)
    modes = sorted(key for key in alike if isinstance(alike[key][0].change, Merged))
    kept: list[Case] = []
    for number, (key, same) in enumerate(alike.items()):
        if key in modes:
            kept += same[number % len(same) :][:1] if modes.index(key) % 12 == 0 else []
        elif key[0] in ("shape", "shape of all"):
            kept += same[number % len(same) :][:1] if key[0] == "shape" or number % 8 == 0 else []
        else:
            one_in = 8 if key[0] == "healthy" else 16
            few = same[number % one_in :: one_in]
            kept += few or same[:1]
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
        if at["dtype"] == "F32":  # what norms half a unit too large do to all values of a row
            yield Case(group="healthy", name="rounded toward zero", change=cut_off, verdict="pass", **at)
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
        ("lora", "rank", "half of it", formula(half_rank), (*unexplained, *WRONG, "ANOTHER_ADAPTER"), ""),
        ("lora", "layers", "one too deep", next_layer, ("DELTA_MISPLACED",), "the delta of"),
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
    # Another end: the model is the same, and what it generates is not.
    yield Case(group="config", name="generation config", kind="lora", dtype="F32", change=generation_config,
               codes=other, verdict="fail")  # fmt: skip
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
        "group": "damage",
        "codes": ("DELTA_UNEXPLAINED", "ROUNDING_EXCESS", "STRENGTH_UNCERTAIN", "ZEROED", "LARGEST_CHANGED",
                  "PARTIAL_MERGE", "ANOTHER_ADAPTER"),
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


def _shapes() -> Iterator[Case]:
    """Every shape of damage, in a square weight or in one that is wider, and in all, of realistic weights."""
    for name, (damage, codes) in SHAPES.items():
        for number, at in enumerate(_every()):
            module = (DOWN, Q)[number % 2]
            yield Case(group="shape", name=name, change=shaped(module, damage), codes=codes, where=module,
                       also=("PARTIAL_MERGE",), real=True, verdict="fail", **at)  # fmt: skip
        low = ("ANOTHER_ADAPTER",) if name == "columns shifted like a bias" else ()  # a change of rank one everywhere
        for at in _every():
            yield Case(group="shape of all", name=name, change=shaped("", damage), codes=(*codes, *low),
                       also=("PARTIAL_MERGE",), real=True, verdict="fail", **at)  # fmt: skip


def _others() -> Iterator[Case]:
    other: dict[str, Any] = {"group": "another adapter", "codes": ("ANOTHER_ADAPTER",), "verdict": "fail"}
    for at in _every():
        yield Case(name="another seed", change=formula(another_seed), **other, **at)
        for drift, growth in ((0.3, 0.3), (0.1, 0.1), (0.5, 0.0)):
            name = f"another checkpoint, {drift:g} off, {growth:g} grown"
            yield Case(name=name, change=formula(another_checkpoint(drift, growth)), **other, **at)


def _more_grids() -> Iterator[Case]:
    ways = {
        **{f"float8 per {scale}": float8(scale) for scale in ("tensor", "row", "column")},
        "float8 e5m2": float8("tensor", torch.float8_e5m2),
        **{f"int8 per {scale}": integers(scale) for scale in ("tensor", "column")},
    }
    for at in _every():
        for name, way in ways.items():
            yield Case(group="requantised", name=name, change=requantised(way), codes=("REQUANTIZED",), verdict="fail",
                       real=True, **at)  # fmt: skip
        if at["dtype"] != "F32":
            also = ("WEIGHT_DECAYED",) if at["kind"] == "dora" else ()  # whose own rounding is as large
            yield Case(group="requantised", name="bits cut off", change=cut_off, codes=("BITS_CUT_OFF",), also=also,
                       verdict="fail", real=True, **at)  # fmt: skip
        for name, way in (("2:4", two_of_four), ("all", torch.zeros_like)):
            yield Case(group="zeroed", name=name, change=requantised(way), codes=("ZEROED",), verdict="fail", **at)


def _magnitudes() -> Iterator[Case]:
    for dtype in DTYPES:
        for how in ("lost", "the base's", "swapped"):
            yield Case(group="magnitudes", name=f"three {how}", kind="dora", dtype=dtype, where=DOWN, verdict="fail",
                       change=magnitudes(how, [2, 9, 17], [DOWN]), size=0.05, real=True,
                       codes=("MAGNITUDE_LOST", "ROW_SCALED"))  # fmt: skip
