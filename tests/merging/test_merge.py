"""Merging on bases made here: every kind, axis, storage and dtype against the formula in float64; what is written
beside the weights; what is refused.

The traps in PEFT's files that are tested here are named by their number in docs/peft-traps.md; the others are tested
where it says.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from conftest import safetensors_bytes
from models import Array, Built, Case, bert, f64, gpt2, llama, mixtral, round_to, scatter, spacing, state
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import d2surgery.files.kept
import d2surgery.merging.prepared
from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.cards import CARD, RECEIPT
from d2surgery.checkpoint import from_adapters, save
from d2surgery.errors import D2SurgeryError
from d2surgery.files.writer import ShardWriter
from d2surgery.formats import open_layout
from d2surgery.merging import merge, plan
from d2surgery.merging.ahead import HashAhead
from d2surgery.merging.tiles import TILE_ENTRIES, Output, Tile, TileMerger

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SHARE = {"BF16": 1 / 1024, "F16": 2 / 1024, "F32": 1.0}
MODULE = "layers.0.proj"


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def make(kind: str, out: int, in_: int, **options: Any) -> Adapter:
    """Random factors with an update of about a tenth of the base."""
    A, B, C, D = numbers(4, in_), numbers(out, 4), numbers(4, in_, seed=7), numbers(out, 4, seed=7)
    if kind == "lora":
        return LoRA(A=A, B=B, scaling=0.003, **options)
    if kind == "dora":
        along = options.get("along", "out_features")
        m = 0.7 * (1 + numbers(out if along == "out_features" else in_).abs())
        return DoRA(A=A, B=B, magnitude=m, scaling=0.003, **options)
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C, D=D, scaling=0.003, **options)
    return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D, scaling=0.003, **options)


def by_hand(adapter: Adapter, W: Array, strength: float = 1.0) -> Array:
    """W0 + strength·(W' − W0) in float64, from the slots alone."""
    v, s = {name: f64(slot) for name, slot in adapter.slots().items()}, adapter.scaling
    if isinstance(adapter, LoRA):
        new = W + s * v["B"] @ v["A"]
    elif isinstance(adapter, DoRA):
        V = W + s * v["B"] @ v["A"]
        new = v["magnitude"][:, None] * V / np.sqrt((V * V).sum(1, keepdims=True))
    elif isinstance(adapter, DualLoRA):
        new = W + s * np.maximum(v["B"] @ v["A"], 0) * np.where(v["D"] @ v["C"] > 0, 1.0, -1.0)
    else:
        assert isinstance(adapter, D2LoRA)
        update = s * (v["B_plus"] @ v["A_plus"] - adapter.tau * v["B_minus"] @ v["A_minus"])
        axis = 1 if adapter.along == "out_features" else 0
        norms = np.sqrt((W * W).sum(axis, keepdims=True)), np.sqrt(((W + update) ** 2).sum(axis, keepdims=True))
        projected = (W + update) * norms[0] / norms[1]
        new = {
            "update": W + update,
            "projected": projected,
            "projected_plus_update": projected + update,
        }[adapter.form]
    return W + strength * (new - W) if strength != 1 else new


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "duallora": ("duallora", {}),
    **{
        f"d2lora {along} {form}": ("d2lora", {"along": along, "form": form, "tau": 0.7})
        for along in ("in_features", "out_features")
        for form in ("projected_plus_update", "projected", "update")
    },
}


def write_base(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write(directory: Path, modules: Mapping[str, Adapter]) -> Path:
    save(from_adapters(modules), directory)
    return directory


def peft_adapter(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter file with these keys (after base_model.model.), as PEFT lays it out."""
    directory.mkdir()
    full = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"], "peft_version": "0.21.2"}
    (directory / "adapter_config.json").write_text(json.dumps({**full, **config}))
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def pair(out: int, in_: int, module: str = MODULE) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": numbers(2, in_), f"{module}.lora_B.weight": numbers(out, 2)}


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    merge(base, adapter, out, **options)
    files = sorted(out.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def codes(error: pytest.ExceptionInfo[D2SurgeryError]) -> list[str]:
    return [problem.code for problem in error.value.problems]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_rounded_once(got: Tensor, before: Array, want: Array, dtype: str) -> None:
    assert got.dtype == DTYPES[dtype]
    off = np.abs(f64(got) - round_to(want, dtype))
    allowed = spacing(np.maximum(np.abs(before), np.abs(want)), dtype)
    assert (np.abs(f64(got) - want) <= 2 * spacing(want, "F32")).all() if dtype == "F32" else (off <= allowed).all()
    assert (off > 0).sum() <= SHARE[dtype] * want.size, f"{(off > 0).sum()} of {want.size}"


# Every kind -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 1000], ids=["one-tile", "many-tiles"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("stored", ["linear", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_formula_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stored: str, dtype: str, tile: int
) -> None:
    """Also where the vectors that are normalised lie across tiles, and the last tile is short and joins another."""
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", tile)
    name, options = KINDS[kind]
    out, in_ = 251, 203
    W = numbers(out, in_, scale=0.05).to(DTYPES[dtype])
    weight = W if stored == "linear" else W.T
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": weight, f"{MODULE}.bias": numbers(out)})
    adapter = make(name, out, in_, **options)
    got = merged(base, write(tmp_path / "adapter", {MODULE: adapter}), tmp_path / "out")[f"{MODULE}.weight"]
    assert_rounded_once(got if stored == "linear" else got.T, f64(W), by_hand(adapter, f64(W)), dtype)


@pytest.mark.parametrize("kind", ["dora", "d2lora in_features projected_plus_update"])
def test_norms_of_one_module_are_not_those_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also where one module's tensor is transposed and another has its shape."""
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", 200)
    name, options = KINDS[kind]
    weights = {f"layers.{i}.proj": numbers(40, 24, seed=i, scale=0.05 * (i + 1)) for i in range(3)}
    stored = {m: W.T if m == "layers.1.proj" else W for m, W in weights.items()}
    base = write_base(tmp_path / "base", {f"{m}.weight": W for m, W in stored.items()})
    adapters = {m: make(name, 40, 24, **options) for m in weights}
    got = merged(base, write(tmp_path / "adapter", adapters), tmp_path / "out")
    for m, W in weights.items():
        found = got[f"{m}.weight"]
        want = by_hand(adapters[m], f64(W))
        assert_rounded_once(found.T if m == "layers.1.proj" else found, f64(W), want, "F32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
def test_strength_multiplies_the_delta(tmp_path: Path, kind: str, strength: float) -> None:
    name, options = KINDS[kind]
    W = numbers(24, 10, scale=0.05)
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": W})
    adapter = make(name, 24, 10, **options)
    got = merged(base, write(tmp_path / "adapter", {MODULE: adapter}), tmp_path / "out", strength=strength)
    assert_rounded_once(got[f"{MODULE}.weight"], f64(W), by_hand(adapter, f64(W), strength), "F32")


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_bit_for_bit(tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    W = numbers(24, 10).bfloat16()
    W[3, 4], W[5, 6], W[7, 8] = -0.0, 1e-40, torch.finfo(torch.bfloat16).max
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": W})
    adapter = write(tmp_path / "adapter", {MODULE: make(name, 24, 10, **options)})
    assert bits(merged(base, adapter, tmp_path / "out", strength=0)[f"{MODULE}.weight"]) == bits(W)


def test_strength_of_lora_bias_is_that_of_the_weight(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4), f"{MODULE}.bias": numbers(6)})
    tensors = pair(6, 4) | {f"{MODULE}.lora_B.bias": numbers(6, seed=1)}
    got = merged(base, peft_adapter(tmp_path / "a", tensors, lora_bias=True), tmp_path / "out", strength=0.5)
    want = f64(numbers(6)) + 0.5 * 2 * f64(numbers(6, seed=1))
    assert_rounded_once(got[f"{MODULE}.bias"], want, want, "F32")


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({"head.weight": numbers(3, 4)}, {"modules_to_save": ["head"]}),
        ({"e.token_adapter.trainable_tokens_delta": numbers(1, 4)}, {"trainable_token_indices": [1]}),
    ],
)
def test_what_is_replaced_has_no_strength(tmp_path: Path, extra: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors = {f"{MODULE}.weight": numbers(6, 4), "head.weight": numbers(3, 4), "e.weight": numbers(5, 4)}
    base = write_base(tmp_path / "base", tensors)
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", pair(6, 4) | extra, **config), tmp_path / "out", strength=0.5)
    assert codes(error) == ["STRENGTH"]


@pytest.mark.parametrize(
    "kind", ["duallora", "d2lora out_features projected", "d2lora in_features projected_plus_update"]
)
def test_the_merged_llama_answers_as_a_float64_forward_with_the_formula(tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    model = llama()
    scatter(model)
    model.save_pretrained(tmp_path / "base")
    exact = T.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    linear = {n: m for n, m in exact.model.named_modules() if n.endswith(("_proj",))}
    adapters = {f"model.{n}": make(name, *m.weight.shape, **options) for n, m in linear.items()}

    def effective(module: Any, x: Any, y: Any, adapter: Adapter) -> Tensor:
        return x[0] @ torch.from_numpy(by_hand(adapter, f64(module.weight))).T  # type: ignore[no-any-return]

    for n, module in linear.items():
        module.register_forward_hook(lambda m, x, y, a=adapters[f"model.{n}"]: effective(m, x, y, a))
    merge(tmp_path / "base", write(tmp_path / "adapter", adapters), tmp_path / "out")
    tokens = torch.tensor([[1, 2, 3, 4, 5, 9]])
    with torch.no_grad():
        want = exact(tokens).logits
        got = T.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        before = T.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()(tokens).logits
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert float((before - want).abs().max() / want.abs().max()) > 1e-3


# What the result does not depend on -----------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A base of many tensors and tiles with a D2 adapter, whose norms lie across tiles."""
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", 128)
    tensors = {f"layers.{i}.proj.weight": numbers(40, 24, seed=i).bfloat16() for i in range(4)}
    base = write_base(tmp_path / "base", tensors | {"norm.weight": numbers(24), "counts": torch.arange(5)})
    adapters = {f"layers.{i}.proj": make("d2lora", 40, 24) for i in range(4)}
    return base, write(tmp_path / "adapter", adapters)


def contents(directory: Path, *, without: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != without}


@pytest.mark.parametrize("max_memory", [10**12, 10**6])
def test_memory_changes_no_byte(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_memory: int
) -> None:
    monkeypatch.setattr(d2surgery.merging.prepared, "resident_memory", lambda: 0)
    merge(*several, tmp_path / "one")
    merge(*several, tmp_path / "two", max_memory=max_memory)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_the_number_of_threads_changes_no_byte(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(d2surgery.merging.prepared, "workers", lambda: 1)
    merge(*several, tmp_path / "one")
    monkeypatch.setattr(d2surgery.merging.prepared, "workers", lambda: threads)
    merge(*several, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("shard_size", [1, 2000, 5000])
def test_the_size_of_shards_changes_no_tensor(several: tuple[Path, Path], tmp_path: Path, shard_size: int) -> None:
    one = merged(*several, tmp_path / "one")
    two = merged(*several, tmp_path / "two", shard_size=shard_size)
    assert {name: bits(tensor) for name, tensor in one.items()} == {name: bits(tensor) for name, tensor in two.items()}


def test_without_hashes_the_weights_are_the_same(several: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*several, tmp_path / "one")
    merge(*several, tmp_path / "two", verify=False)
    one, two = (contents(tmp_path / name, without=RECEIPT) for name in ("one", "two"))
    assert b"sha256" in one.pop(CARD)
    assert b"sha256" not in two.pop(CARD)
    assert one == two


def test_a_base_is_hashed_once(several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier merge hashed is not hashed again: a hash that was kept wrong shows, and `verify` mends it."""
    monkeypatch.setattr(d2surgery.files.kept, "_TICK", -3600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def inputs(name: str, **options: Any) -> dict[str, str]:
        merge(*several, tmp_path / name, **options)
        found: dict[str, str] = json.loads((tmp_path / name / RECEIPT).read_text())["base"]["tensors"]
        return found

    first = inputs("first")
    assert inputs("again") == first
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    for place in (tmp_path / "cache").rglob("*.json"):
        place.write_text(json.dumps(dict.fromkeys(json.loads(place.read_text()), "0" * 64)))
    wrong = inputs("kept wrong")
    assert "0" * 64 in wrong.values()
    assert inputs("hashed again", verify=True) == first
    assert inputs("mended") == first


def test_hashes_taken_ahead_are_those_taken_from_the_tiles(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors of the adapter known before the first tile, or none of them: the receipt is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where nothing is known from an earlier merge
    stop = HashAhead.stop
    known: list[int] = []

    def stopped(self: HashAhead, count: int) -> dict[str, str]:
        if self._process is not None:
            self._process.wait()
        found = stop(self)
        known.append(len(found))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return dict(list(found.items())[:count])

    monkeypatch.setattr(d2surgery.merging, "sys", SimpleNamespace(modules={}))  # as if torch were to be imported
    for count in (0, 2, 4):
        monkeypatch.setattr(HashAhead, "stop", partialmethod(stopped, count))
        merge(*several, tmp_path / str(count))
    assert known == [4, 0] * 3  # the second time when the block ends
    assert contents(tmp_path / "0") == contents(tmp_path / "2") == contents(tmp_path / "4")


def test_a_process_that_has_yet_to_import_torch_writes_the_same(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", TILE_ENTRIES)  # as in the other process
    merge(*several, tmp_path / "one")
    options = ["--base", str(several[0]), "--adapter", str(several[1]), "--out", str(tmp_path / "two"), "--quiet"]
    subprocess.run([sys.executable, "-m", "d2surgery", "merge", *options], check=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("threads", [1, 4])
def test_progress_counts_every_byte_and_never_goes_back(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(d2surgery.merging.prepared, "workers", lambda: threads)
    for dtype in (None, "F32"):
        seen: list[tuple[int, int]] = []
        report = merge(*several, tmp_path / str(dtype), dtype=dtype, progress=lambda *at, seen=seen: seen.append(at))
        assert seen == sorted(seen)
        assert seen[-1] == (report.bytes_written, report.bytes_written)


def test_an_error_in_one_tensor_stops_the_others_and_leaves_no_thread(
    several: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second tensor never runs out of tiles: without a stop this would not end."""
    monkeypatch.setattr(d2surgery.merging.prepared, "workers", lambda: 2)
    before = threading.enumerate()
    begun = threading.Event()
    tiles = TileMerger.tiles

    def endless(self: TileMerger, output: Output) -> Iterator[Tile]:
        if output.name == "layers.0.proj.weight":
            assert begun.wait(60)
            raise MemoryError
        if output.name == "layers.1.proj.weight":
            begun.set()
            yield from (tile for _ in itertools.count() for tile in tiles(self, output))
        yield from tiles(self, output)

    monkeypatch.setattr(TileMerger, "tiles", endless)
    monkeypatch.setattr(ShardWriter, "write", lambda self, name, piece: None)
    with pytest.raises(MemoryError):
        merge(*several, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert threading.enumerate() == before


@pytest.mark.parametrize("change", [lambda file: os.utime(file, ns=(1, 1)), lambda file: file.open("ab").write(b"x")])
def test_a_base_that_changes_while_it_is_merged_is_refused(
    several: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    with pytest.raises(D2SurgeryError) as error:
        merge(*several, tmp_path / "out", progress=lambda done, total: change(several[0] / "model.safetensors"))
    assert codes(error) == ["BASE_CHANGED"]
    assert not (tmp_path / "out").exists()


def test_a_sharded_base_gives_the_tensors_of_a_single_file(several: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = several
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, sharded / f"part{i}.safetensors")
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one, two = merged(base, adapter, tmp_path / "one"), merged(sharded, adapter, tmp_path / "two")
    assert {name: bits(tensor) for name, tensor in one.items()} == {name: bits(tensor) for name, tensor in two.items()}


# Output dtype ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 64])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize("stored", ["F64", "F32", "BF16", "F16"])
def test_another_dtype_is_rounded_once_for_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, dtype: str, tile: int
) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", tile)
    W, other = numbers(40, 24).to(DTYPES[stored]), numbers(900, seed=1).to(DTYPES[stored])
    tensors = {f"{MODULE}.weight": W, "norm.weight": other, "counts": torch.arange(3)}
    base = write_base(tmp_path / "base", tensors, dtype="float32")
    adapter = make("lora", 40, 24)
    got = merged(base, write(tmp_path / "a", {MODULE: adapter}), tmp_path / "out", dtype=dtype)
    want = by_hand(adapter, f64(W))
    if dtype == "F64":
        assert np.abs(f64(got[f"{MODULE}.weight"]) - want).max() < 1e-14
        assert (f64(got["norm.weight"]) == f64(other)).all()
    else:
        assert_rounded_once(got[f"{MODULE}.weight"], f64(W), want, dtype)
        assert (f64(got["norm.weight"]) == round_to(f64(other), dtype)).all()
    assert torch.equal(got["counts"], torch.arange(3))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


def test_a_tensor_outside_the_adapter_that_overflows_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4), "norm.weight": torch.full((4,), 1e6)})
    with pytest.raises(D2SurgeryError, match=r"norm\.weight.*overflows F16") as error:
        merge(base, write(tmp_path / "a", {MODULE: make("lora", 6, 4)}), tmp_path / "out", dtype="F16")
    assert codes(error) == ["NOT_FINITE"]


# Traps in PEFT's files (docs/peft-traps.md) -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["e.weight", "e.base_layer.weight"])
def test_trap_9_an_embedding_saved_in_full_replaces_the_base(tmp_path: Path, key: str) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4), "e.weight": numbers(5, 4)})
    saved = numbers(5, 4, seed=1)
    got = merged(base, peft_adapter(tmp_path / "a", pair(6, 4) | {key: saved}), tmp_path / "out")
    assert torch.equal(got["e.weight"], saved)


def zero_row(tmp_path: Path, magnitude: float) -> tuple[Path, Path]:
    W = numbers(12, 4)
    W[9] = 0
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": W})
    B = numbers(12, 2)
    B[9] = 0
    m = torch.ones(12)
    m[9] = magnitude
    tensors = pair(12, 4) | {f"{MODULE}.lora_B.weight": B, f"{MODULE}.lora_magnitude_vector": m}
    return base, peft_adapter(tmp_path / "a", tensors, use_dora=True)


def test_trap_13_a_zero_row_with_magnitude_zero_stays_zero_where_pefts_formula_is_nan(tmp_path: Path) -> None:
    base, adapter = zero_row(tmp_path, 0.0)
    got = merged(base, adapter, tmp_path / "out")[f"{MODULE}.weight"]
    assert torch.equal(got[9], torch.zeros(4))
    assert torch.isfinite(got).all()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 12, bias=False)})])

    net = Net()
    net.load_state_dict(load_file(base / "model.safetensors"))
    theirs = PeftModel.from_pretrained(net, adapter).merge_and_unload().layers[0]["proj"].weight
    assert torch.isnan(theirs[9]).all()
    assert torch.allclose(theirs[:9], got[:9], atol=1e-6)


@pytest.mark.parametrize(("tile", "first", "row"), [(1 << 20, 0, 9), (16, 8, 1)])
def test_trap_13_a_zero_row_with_a_magnitude_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int, first: int, row: int
) -> None:
    monkeypatch.setattr(d2surgery.merging.tiles, "TILE_ENTRIES", tile)
    base, adapter = zero_row(tmp_path, 1.0)
    with pytest.raises(D2SurgeryError, match=rf"ZERO_NORM {MODULE}, counting from row {first} of.*: {row}\b"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trap_14_dora_with_a_sixteen_bit_adapter_is_still_rounded_once(tmp_path: Path) -> None:
    """PEFT with autocast off computes in bf16 and rounds about half of the weights wrongly."""
    W = numbers(64, 48, scale=0.05).bfloat16()
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": W})
    adapter = make("dora", 64, 48).to(dtype=torch.bfloat16)
    got = merged(base, write(tmp_path / "a", {MODULE: adapter}), tmp_path / "out")
    assert_rounded_once(got[f"{MODULE}.weight"], f64(W), by_hand(adapter, f64(W)), "BF16")


@pytest.fixture(scope="module")
def bf16_case(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A float32 adapter on a bfloat16 base, scaling a power of two."""
    built = Built(
        Case(base=lambda: llama(hidden_size=64).bfloat16(), lora=_q(lora_alpha=2)), tmp_path_factory.mktemp("b")
    )
    merge(built.base, built.adapter, built.folder / "merged")
    return built


def _q(**options: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 4, **options}


def _in_bf16(built: Built, **options: Any) -> Any:
    return PeftModel.from_pretrained(built.load(built.base, torch.bfloat16), built.adapter, **options)


def test_trap_15_bf16_is_pefts_unsafe_merge_bit_for_bit_and_not_its_safe_one(bf16_case: Built) -> None:
    got = state(bf16_case.load(bf16_case.folder / "merged", "auto"))
    unsafe = state(_in_bf16(bf16_case).merge_and_unload())
    safe = state(_in_bf16(bf16_case).merge_and_unload(safe_merge=True))
    assert all(torch.equal(got[name], unsafe[name]) for name in got)
    wrong = sum(int((got[name] != safe[name]).sum()) for name in got)
    assert wrong > 100, "PEFT's safe merge rounds the update first"


def test_trap_25_a_float32_adapter_is_never_cast_through_the_base_dtype(bf16_case: Built) -> None:
    got = state(bf16_case.load(bf16_case.folder / "merged", "auto"))
    cast = state(_in_bf16(bf16_case, low_cpu_mem_usage=True).merge_and_unload())
    assert any(not torch.equal(got[name], cast[name]) for name in got)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_trap_16_an_initialisation_that_changed_the_base_is_refused(tmp_path: Path, init: str) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", pair(6, 4), init_lora_weights=init), tmp_path / "out")
    assert codes(error) == ["MUTATED_BASE"]


def test_trap_18_experts_packed_by_peft_0_19_0_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"mlp.experts.down_proj": numbers(3, 6, 4)})
    tensors = {"mlp.experts.lora_A.weight": numbers(6, 4), "mlp.experts.lora_B.weight": numbers(6, 6)}
    options = {"target_parameters": ["experts.down_proj"], "target_modules": None}
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", tensors, **options, peft_version="0.19.0"), tmp_path / "out")
    assert codes(error) == ["OLD_EXPERT_PACKING"]
    merge(base, peft_adapter(tmp_path / "b", tensors, **options), tmp_path / "out")


def test_trap_19_an_adapter_per_expert_of_transformers_4_is_peft_s_conversion_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixtral().save_pretrained(tmp_path / "base")
    experts = [f"model.layers.{i}.block_sparse_moe.experts.{e}" for i in range(2) for e in range(4)]
    tensors: dict[str, Tensor] = {}
    for seed, root in enumerate(experts):
        for name, (out, in_) in {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}.items():
            tensors[f"{root}.{name}.lora_A.weight"] = numbers(2, in_, seed=seed + 50 * len(tensors))
            tensors[f"{root}.{name}.lora_B.weight"] = numbers(out, 2, seed=seed + 50 * len(tensors))
    adapter = peft_adapter(tmp_path / "a", tensors, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    merge(tmp_path / "base", adapter, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(T.MixtralForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        want = model(tokens).logits
        got = T.MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        before = T.MixtralForCausalLM.from_pretrained(tmp_path / "base").eval()(tokens).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert float((before - want).abs().max()) > 1e-2 * float(want.abs().max())


def test_trap_20_multihead_attention_is_refused(tmp_path: Path) -> None:
    """PEFT applies out_proj's update twice; its keys are those of an unnamed in_proj."""
    base = write_base(tmp_path / "base", {"attn.in_proj_weight": numbers(12, 4), "attn.out_proj.weight": numbers(4, 4)})
    tensors = pair(12, 4, "attn") | pair(4, 4, "attn.base_layer.out_proj")
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", tensors, target_modules=["attn"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "attn" in str(error.value)


def test_trap_24_replicated_layers_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", pair(6, 4), layer_replication=[[0, 1], [0, 1]]), tmp_path / "out")
    assert codes(error) == ["LAYER_REPLICATION"]


# What else is written -------------------------------------------------------------------------------------------------


def test_index_receipt_and_files(several: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = several
    for name in ("generation_config.json", "tokenizer.json", "vocab.txt", "modeling_x.py"):
        (base / name).write_text(f"{name} é\r\n")
    for name in ("README.md", "pytorch_model.bin", "other.gguf", ".hidden"):
        (base / name).write_text("x")
    report = merge(base, adapter, tmp_path / "out", shard_size=3000)
    out = tmp_path / "out"
    kept = {"generation_config.json", "tokenizer.json", "vocab.txt", "modeling_x.py"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert {path.name for path in out.iterdir()} == kept | files | {
        "config.json",
        "model.safetensors.index.json",
        RECEIPT,
        CARD,
    }
    assert (out / CARD).read_bytes() != b"x", "the base's card describes the base"
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in kept)
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(out / file).values())
    assert index["weight_map"] == {name: file for file in files for name in load_file(out / file)}
    assert all(b'"format":"pt"' in (out / file).read_bytes()[:200] for file in files)
    assert report.bytes_written == sum((out / file).stat().st_size for file in files)
    assert report.tensors_written == len(index["weight_map"])
    assert report.modules_merged == 4


def raw_hashes(file: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes, read without any library."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return {
        name: hashlib.sha256(data[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]]).hexdigest()
        for name, e in entries.items()
        if name != "__metadata__"
    }


def test_the_receipt_holds_the_sha256_of_every_tensor_and_no_path_or_time(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base",
        {f"{MODULE}.weight": numbers(6, 4), "e.weight": numbers(5, 4), "head.weight": numbers(3, 4)},
    )
    adapter = peft_adapter(
        tmp_path / "a",
        pair(6, 4) | {"head.weight": numbers(3, 4, seed=1)},
        modules_to_save=["head"],
        base_model_name_or_path=str(base),
    )
    merge(base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / RECEIPT).read_text()
    receipt = json.loads(text)
    inputs = raw_hashes(base / "model.safetensors")
    del inputs["head.weight"]  # replaced: never read
    assert receipt["base"]["tensors"] == inputs
    assert receipt["adapter"]["tensors"] == raw_hashes(adapter / "adapter_model.safetensors")
    assert receipt["outputs"]["tensors"] == raw_hashes(tmp_path / "out" / "model.safetensors")
    for name, digest in receipt["outputs"]["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert "config.json" in receipt["outputs"]["files"]
    assert str(tmp_path) not in text
    shutil.copytree(base, tmp_path / "elsewhere" / "base")
    shutil.copytree(adapter, tmp_path / "elsewhere" / "a")
    merge(tmp_path / "elsewhere" / "base", tmp_path / "elsewhere" / "a", tmp_path / "elsewhere" / "out")
    assert (tmp_path / "elsewhere" / "out" / RECEIPT).read_text() == text, "the same merge, elsewhere and later"


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_brings_its_size_and_tokenizer(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    llama(tied).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("old")
    (tmp_path / "base" / "tokenizer_config.json").write_text("kept")
    model = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(**_q(modules_to_save=None)))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(numbers(*parameter.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    (tmp_path / "a" / "tokenizer.json").write_text("new")
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    again = T.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.vocab_size == 40
    tokens = torch.tensor([[1, 39, 33, 4]])
    with torch.no_grad():
        want, got = peft.eval()(tokens).logits, again(tokens).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "kept"


@pytest.mark.parametrize("tied", [False, True])
def test_saved_embeddings_of_a_resized_vocabulary_come_with_copies(tmp_path: Path, tied: bool) -> None:
    """PEFT's usual file when tokens were added and trained: each embedding three times, of which it loads one."""
    torch.manual_seed(0)
    llama(tied).save_pretrained(tmp_path / "base")
    model = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**_q(modules_to_save=["embed_tokens", "lm_head"])))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(numbers(*parameter.shape))
        peft.save_pretrained(tmp_path / "a")
    superseded = open_layout(tmp_path / "a").superseded
    assert len(superseded) == 4
    report = merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert [p.code for p in report.problems] == ["SUPERSEDED"] * 4
    again = T.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[1, 39, 33, 4]])
    with torch.no_grad():
        want, got = peft.eval()(tokens).logits, again(tokens).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_one_side_of_a_resized_vocabulary_is_refused(tmp_path: Path, saved: str, tied: bool) -> None:
    """PEFT saves what modules_to_save names; a model with 40 tokens in and 32 out would not even load."""
    llama(tied).save_pretrained(tmp_path / "base")
    model = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**_q(modules_to_save=[saved])))
        peft.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    with pytest.raises(D2SurgeryError) as caught:
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert [(p.code, p.wanted, p.got) for p in caught.value.problems] == [("VOCABULARY_SPLIT", "40 tokens", "32")]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [2, 5])
def test_a_new_head_loads_with_its_number_of_labels(tmp_path: Path, labels: int) -> None:
    case = Case(
        base=bert,
        used_as=T.BertForSequenceClassification,
        options={"num_labels": labels},
        lora={"target_modules": ["query"], "r": 2, "task_type": "SEQ_CLS"},
    )
    built = Built(case, tmp_path)
    merge(built.base, built.adapter, tmp_path / "merged")
    model = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.num_labels == labels
    assert torch.allclose(built.forward(model), built.unmerged, atol=1e-5)


@pytest.mark.parametrize(("targets", "tied"), [(["q_proj"], True), (["lm_head"], False), (["embed_tokens"], False)])
def test_the_tie_stays_in_the_config_unless_one_side_changed(tmp_path: Path, targets: list[str], tied: bool) -> None:
    case = Case(base=lambda: llama(tied=True), lora={"target_modules": targets, "r": 2})
    built = Built(case, tmp_path)
    merge(built.base, built.adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not tied


def test_an_undeclared_embedding_on_a_tied_base_reaches_both_sides_as_in_peft(tmp_path: Path) -> None:
    """PEFT loads `embed_tokens.weight` into the shared parameter when no module was saved under its name."""
    built = Built(Case(base=lambda: llama(tied=True), lora=_q()), tmp_path)
    file = built.adapter / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.weight": numbers(32, 16)}
    save_file(load_file(file) | extra, file)
    merge(built.base, built.adapter, tmp_path / "merged")
    got = built.forward(built.load(tmp_path / "merged"))
    assert float((got - built.unmerged).abs().max()) < 1e-5 * float(built.unmerged.abs().max())


def test_ensured_ties_whose_two_adapters_differ_are_refused(tmp_path: Path) -> None:
    lora = {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "ensure_weight_tying": True}
    built = Built(Case(base=lambda: llama(tied=True), lora=lora), tmp_path)
    file = built.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 3] += 1
    save_file(tensors, file)
    with pytest.raises(D2SurgeryError, match="lm_head") as error:
        merge(built.base, built.adapter, tmp_path / "merged")
    assert codes(error) == ["TIE_BROKEN_BY_FILE"]


def test_buffers_of_a_saved_module_keep_their_integers(tmp_path: Path) -> None:
    """A BatchNorm counts its batches in int64; the base lacks the module."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4).bfloat16()})
    extra = {"norm.weight": numbers(3), "norm.num_batches_tracked": torch.tensor(7)}
    got = merged(base, peft_adapter(tmp_path / "a", pair(6, 4) | extra, modules_to_save=["norm"]), tmp_path / "out")
    assert torch.equal(got["norm.num_batches_tracked"], torch.tensor(7))
    assert torch.equal(got["norm.weight"], numbers(3).bfloat16())


def test_every_tensor_of_the_adapter_is_used_or_is_an_error(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    merge(base, peft_adapter(tmp_path / "a", pair(6, 4)), tmp_path / "out")
    for i, key in enumerate(("x.lora_E", f"{MODULE}.lora_diag", "other.lora_A.weight", f"{MODULE}.bias")):
        extra = pair(6, 4) | {key: numbers(4)}
        with pytest.raises(D2SurgeryError, match=key.partition(".lora")[0].replace(".", r"\.")):
            merge(base, peft_adapter(tmp_path / f"a{i}", extra), tmp_path / f"out{i}")


def test_two_spellings_of_one_module_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.layers.0.proj.weight": numbers(6, 4)})
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", pair(6, 4) | pair(6, 4, "model.layers.0.proj")), tmp_path / "out")
    assert codes(error) == ["AMBIGUOUS_MODULE"]


# The plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_merge_will_do_and_writes_nothing(several: tuple[Path, Path], tmp_path: Path) -> None:
    before = contents(tmp_path / "base")
    forecast = plan(*several, tmp_path / "out", shard_size=3000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert contents(tmp_path / "base") == before
    report = merge(*several, tmp_path / "out", shard_size=3000)
    assert (forecast.tensors, forecast.bytes, forecast.modules) == (
        report.tensors_written,
        report.bytes_written,
        report.modules_merged,
    )
    assert forecast.shards == len(list((tmp_path / "out").glob("model-*.safetensors")))
    assert set(forecast.survival) == {f"layers.{i}.proj" for i in range(4)}


def test_plan_refuses_what_merge_refuses(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    with pytest.raises(D2SurgeryError) as error:
        plan(base, peft_adapter(tmp_path / "a", pair(6, 5)), tmp_path / "out")
    assert codes(error) == ["SHAPE_MISMATCH"]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_every_bad_number_in_the_adapter_is_listed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    tensors = pair(6, 4)
    a, b = tensors
    tensors[a][1, 2], tensors[b][0, 0] = torch.nan, torch.inf
    with pytest.raises(D2SurgeryError) as error:
        merge(base, peft_adapter(tmp_path / "a", tensors), tmp_path / "out")
    assert [(p.code, p.module) for p in error.value.problems] == [
        ("NOT_FINITE", f"base_model.model.{a}"),
        ("NOT_FINITE", f"base_model.model.{b}"),
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["lora", "dora", "d2lora", "duallora"])
def test_a_bad_number_in_an_adapted_tensor_of_the_base_is_named(tmp_path: Path, kind: str, bad: float) -> None:
    W = numbers(6, 4)
    W[2, 1] = bad
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": W})
    with pytest.raises(D2SurgeryError, match=rf"{MODULE}.*the base holds NaN or infinity") as error:
        merge(base, write(tmp_path / "a", {MODULE: make(kind, 6, 4)}), tmp_path / "out")
    assert codes(error) == ["NOT_FINITE"]
    assert not (tmp_path / "out").exists()


def test_a_merged_value_beyond_fp16_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": torch.full((6, 4), 6e4).half()})
    tensors = {
        f"{MODULE}.lora_A.weight": torch.full((2, 4), 100.0),
        f"{MODULE}.lora_B.weight": torch.full((6, 2), 100.0),
    }
    with pytest.raises(D2SurgeryError, match=rf"{MODULE}\.weight: a merged value overflows F16") as error:
        merge(base, peft_adapter(tmp_path / "a", tensors), tmp_path / "out")
    assert codes(error) == ["NOT_FINITE"]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "BAD_BASE"),
        (lambda base: shutil.rmtree(base), "BAD_BASE"),
        (lambda base: (base / "model.safetensors").write_bytes(b""), "FILE_EMPTY"),
        (lambda base: (base / "model.safetensors").write_bytes(safetensors_bytes({"x": (2,)})[:-1]), "TRUNCATED_FILE"),
        (lambda base: _index(base, {f"{MODULE}.weight": "gone.safetensors"}), "MISSING_SHARD"),
        (lambda base: _index(base, {"gone": "part.safetensors"}), "MISSING_SHARD"),
        (lambda base: (base / "config.json").write_text("{"), "BAD_CONFIG"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(tmp_path: Path, damage: Callable[[Path], Any], code: str) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4)})
    adapter = peft_adapter(tmp_path / "a", pair(6, 4))
    damage(base)
    with pytest.raises(D2SurgeryError) as error:
        merge(base, adapter, tmp_path / "out")
    assert codes(error) == [code]


def _index(base: Path, weight_map: dict[str, str]) -> None:
    (base / "model.safetensors").rename(base / "part.safetensors")  # beside model.safetensors no index is read
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_pickled_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": numbers(6, 4), "head.weight": numbers(3, 4)})
    tensors = pair(6, 4) | {"head.weight": numbers(3, 4, seed=1)}
    adapter = peft_adapter(tmp_path / "a", tensors, modules_to_save=["head"])
    merge(base, adapter, tmp_path / "one")
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    merge(base, adapter, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_head_beside_gpt2_is_new_and_the_rest_is_untouched(tmp_path: Path) -> None:
    built = Built(
        Case(
            base=gpt2,
            used_as=T.GPT2ForSequenceClassification,
            lora={"target_modules": ["c_attn"], "r": 2, "task_type": "SEQ_CLS"},
        ),
        tmp_path,
    )
    merge(built.base, built.adapter, tmp_path / "merged")
    before, after = load_file(built.base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert after.keys() - before.keys() == {"score.weight"}
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
