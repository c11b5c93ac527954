"""Merge an adapter into a base: W0 + strength·delta, streamed by row tiles, rounded once, published whole.

Every tensor of the merged checkpoint is one `_Output`; it is read, computed and written tile by tile. The tile grid
depends on shapes alone, so the result does not depend on the memory given. Where an adapter normalises vectors that
no single tile holds, the tensor is read twice: once to sum each vector's triple, once to merge.
"""

import hashlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, Triple
from d2surgery.base import BaseWeights
from d2surgery.checkpoint import Checkpoint, load
from d2surgery.errors import D2SurgeryError, Problem, raise_errors, refuse
from d2surgery.header import BITS, FLOATS, TensorInfo
from d2surgery.layout import Layout
from d2surgery.measures.fidelity import Survival, survival
from d2surgery.sites import Landing, Patch, Site, sites
from d2surgery.tensors import DTYPES, as_bytes, read_into, rounded
from d2surgery.writer import (
    Entry,
    Partial,
    Shard,
    ShardWriter,
    hash_tensors,
    index_bytes,
    pipeline,
    shards,
)

RECEIPT = "d2surgery_merge.json"
TILE = 1 << 20  # entries; 4 MB in float32, small enough for the cache
SHARD_SIZE = 5_000_000_000
_LEAST_ROWS = 4  # products of one to three rows take other code paths in the linear-algebra library
_BUFFERS = 4
_TOKENIZER_FILES = ("token", "vocab", "merges", "special_", "added_", "spiece", "sentencepiece", "chat_template")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


@dataclass(frozen=True)
class MergeReport:
    """What merge wrote. `survival` is filled by plan only."""

    out: str
    tensors_written: int
    bytes_written: int
    modules_merged: int
    seconds: float
    peak_memory_bytes: int
    receipt: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class PlanReport:
    """What merge would do."""

    out: str
    tensors: int
    bytes: int
    disk_free_bytes: int
    peak_memory_bytes: int
    shards: int
    modules: int
    untied: bool
    survival: Mapping[str, Mapping[str, Survival]]  # module -> dtype -> survival
    problems: tuple[Problem, ...]


class _Output(NamedTuple):
    """One tensor of the merged checkpoint: from which stored bytes, with which site, in which dtype."""

    name: str
    info: TensorInfo
    dtype: str
    site: Site | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.site.shape if self.site else self.info.shape

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.dtype, self.shape, prod(self.shape) * BITS[self.dtype] // 8)

    @property
    def copied(self) -> bool:
        return self.site is None and self.dtype == self.info.dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """One precision above the output: float32 for 16-bit outputs, float64 for float32 and float64 ones."""
        wide = self.dtype in ("F32", "F64") or self.info.dtype == "F64"
        return torch.float64 if wide else torch.float32


class _Tile(NamedTuple):
    """A byte range of an output's source. With a patch: whole rows first..last of the stored matrix."""

    output: _Output
    start: int
    nbytes: int
    first: int = 0
    last: int = 0
    patch: Patch | None = None
    measure: bool = False  # only sum the triples


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    resume: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write `base` with `adapter` merged into it to the directory `out`, which transformers then loads.

    merged = round(W0 + strength·delta), computed one precision above the output and rounded once to `dtype`
    ("F32", "BF16", "F16", "F64"; None: each tensor keeps the base's). Nothing stands at `out` until all is written.

    max_memory: bytes of resident memory that may be used. shard_size: bytes per output file. resume: continue an
    interrupted merge with the same arguments. verify=False writes no hashes and does not fsync.
    progress(done, total) is called with bytes written.

    Raises D2SurgeryError with every misfit at once, before anything is written: what `load` and `sites` find,
    NOT_FINITE, STRENGTH, OUTPUT_EXISTS, RESUME_MISMATCH, DISK_FULL, MEMORY; while merging ZERO_NORM and NOT_FINITE.
    """
    began = time.monotonic()
    job = _prepare(base, adapter, dtype, strength, device)
    files = shards((output.entry for output in job.outputs), shard_size)
    partial = Partial(Path(out), sync=verify)
    adapter_hashes = job.check_adapter(hashes=verify)
    recipe = job.recipe(shard_size, verify, adapter_hashes)
    buffers = job.buffers(max_memory)
    _check_disk(partial, sum(shard.nbytes for shard in files))
    partial.open(recipe, resume)
    total = sum(shard.nbytes for shard in files)
    written = 0
    input_hashes: dict[str, str] = {}
    output_hashes: dict[str, str] = {}
    with _one_thread():
        for shard in files:
            line = partial.finished.get(shard.file)
            if line is None or hash_tensors(partial.path / shard.file, shard) != line["outputs"]:
                line = job.write_shard(partial, shard, buffers, verify, lambda n: progress(written + n, total))  # noqa: B023
            input_hashes |= line["inputs"]
            output_hashes |= line["outputs"]
            written += shard.nbytes
            progress(written, total)
    extra = job.write_files(partial, files)
    receipt = {
        "schema_version": 1,
        "d2surgery": version("d2surgery"),
        "torch": torch.__version__,
        "recipe": {k: v for k, v in recipe.items() if k not in ("files", "adapter")},
        "base": {"tensors": dict(sorted(input_hashes.items()))},
        "adapter": {"tensors": adapter_hashes, "base_model": _hub_id(job.layout.base_model)},
        "outputs": {"tensors": dict(sorted(output_hashes.items())), "files": extra},
        "untied": job.landing.untied,
        "problems": [asdict(problem) for problem in job.problems],
    }
    partial.write(RECEIPT, json.dumps(receipt, indent=1).encode())
    partial.publish()
    return MergeReport(
        out=str(out),
        tensors_written=len(job.outputs),
        bytes_written=total,
        modules_merged=len(job.layout.adapters),
        seconds=time.monotonic() - began,
        peak_memory_bytes=_peak_memory(),
        receipt=str(Path(out) / RECEIPT),
        problems=job.problems,
    )


def plan(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    strength: float = 1.0,
    max_memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "cpu",
    dtypes: tuple[str, ...] = ("BF16", "F16"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PlanReport:
    """What `merge` with the same arguments would do, and how much of each module's delta would survive in `dtypes`.

    Reads the adapted tensors once or twice, writes nothing. Raises what merge raises before it writes.
    """
    job = _prepare(base, adapter, dtype, strength, device)
    job.check_adapter(hashes=False)
    files = shards((output.entry for output in job.outputs), shard_size)
    buffers = job.buffers(max_memory)
    with _one_thread():
        found = job.survival(buffers, dtypes, progress)
    tile_bytes = TILE * 8 * 4
    return PlanReport(
        out=str(out),
        tensors=len(job.outputs),
        bytes=sum(shard.nbytes for shard in files),
        disk_free_bytes=shutil.disk_usage(_existing(Path(out))).free,
        peak_memory_bytes=max(_peak_memory(), _resident_memory() + tile_bytes),
        shards=len(files),
        modules=len(job.layout.adapters),
        untied=job.landing.untied,
        survival=found,
        problems=job.problems,
    )


def _prepare(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dtype: str | None,
    strength: float,
    device: str,
) -> "_Job":
    checkpoint = load(adapter)
    weights = BaseWeights(base)
    landing = sites(checkpoint.layout, weights.header, weights.config)
    problems = [*checkpoint.layout.problems, *landing.problems]
    if strength != 1 and (checkpoint.layout.replacements or checkpoint.layout.rows):
        names = ", ".join([*checkpoint.layout.replacements, *checkpoint.layout.rows][:3])
        problems.append(
            Problem(code="STRENGTH", message="replaced weights", wanted="1", got=f"{strength}", module=names)
        )
    problems += _unconsumed(checkpoint.layout, landing)
    raise_errors(problems)
    return _Job(checkpoint, weights, landing, tuple(problems), dtype, strength, _device(device))


def _unconsumed(layout: Layout, landing: Landing) -> Iterator[Problem]:
    """Conservation: what no site uses and no problem names would be lost silently. Here it is named."""
    modules = {patch.module for site in landing.sites.values() for patch in site.patches}
    used = {key for module in modules for slot, key in layout.adapters[module].slots.items() if slot != "bias"}
    used |= {layout.adapters[site.bias].slots["bias"] for site in landing.sites.values() if site.bias}
    used |= {site.replacement for site in landing.sites.values() if site.replacement}
    used |= {site.rows.key for site in landing.sites.values() if site.rows}
    used |= {key for _, key in landing.twins}
    if not any(problem.severity == "error" for problem in (*layout.problems, *landing.problems)):
        for key in sorted(layout.header.tensors.keys() - used):
            yield Problem(code="UNKNOWN_TENSOR", message="no place in the base takes it", module=key)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise refuse("USAGE", f"no such device here: {str(error).splitlines()[0]}", got=name) from None


@dataclass
class _Job:
    """One merge: what to do, and the tensors at hand while it is done."""

    checkpoint: Checkpoint
    base: BaseWeights
    landing: Landing
    problems: tuple[Problem, ...]
    dtype: str | None
    strength: float
    device: torch.device
    triples: dict[Patch, Triple] = field(default_factory=dict)
    current: tuple[Any, Adapter] | None = None  # the adapter in use, and of what it is
    workspace: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.layout: Layout = self.checkpoint.layout
        self.outputs = self._outputs()

    def _outputs(self) -> list[_Output]:
        base = self.base.header.tensors
        floats = Counter(info.dtype for info in base.values() if info.dtype in FLOATS)
        usual = floats.most_common(1)[0][0] if floats else "F32"
        order = sorted(base, key=lambda name: (base[name].file, base[name].start))
        outputs = []
        for name in [*order, *(name for name in self.landing.sites if name not in base)]:
            site = self.landing.sites.get(name)
            info = self._source(name, site)
            stored = base[site.source].dtype if site and site.source else info.dtype if site is None else usual
            if info.dtype not in FLOATS:  # a counter that a saved module brings along
                stored = info.dtype
            dtype = self.dtype if self.dtype and stored in FLOATS else stored
            outputs.append(_Output(name, info, dtype, None if self.strength == 0 else site))
        return outputs

    def _source(self, name: str, site: Site | None) -> TensorInfo:
        if site is not None and site.replacement:
            return self.layout.header.tensors[site.replacement]
        return self.base.header.tensors[site.source if site and site.source else name]

    # Before writing ----------------------------------------------------------------------------------------------

    def check_adapter(self, *, hashes: bool) -> dict[str, str]:
        """Read every adapter tensor once: all finite, tied twins equal. Returns their sha256."""
        problems: list[Problem] = []
        digests: dict[str, str] = {}
        for key in sorted(self.layout.header.tensors):
            tensor = self.checkpoint.tensor(key)
            if hashes:
                digests[key] = hashlib.sha256(as_bytes(tensor)).hexdigest()
            if not _all_finite(tensor):
                problems.append(Problem(code="NOT_FINITE", message="NaN or infinity", module=key))
        for first, second in self.landing.twins:
            a, b = self.checkpoint.tensor(first), self.checkpoint.tensor(second)
            if not (torch.equal(a, b) or torch.equal(a.T, b)):
                problems.append(Problem(code="TIE_BROKEN_BY_FILE", message=f"differs from {first}", module=second))
        raise_errors(problems)
        return digests

    def recipe(self, shard_size: int, verify: bool, adapter_hashes: Mapping[str, str]) -> dict[str, Any]:
        """All that decides the bytes written. The files' times stand in the journal, not in the receipt."""
        stats = [(file, file.stat()) for file in self.base.header.files]
        return {
            "files": [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
            "adapter": hashlib.sha256(json.dumps([adapter_hashes, dict(self.layout.config)]).encode()).hexdigest(),
            "versions": [version("d2surgery"), torch.__version__],
            "dtype": self.dtype,
            "strength": self.strength,
            "shard_size": shard_size,
            "tile": TILE,
            "device": self.device.type,
            "verify": verify,
        }

    def buffers(self, max_memory: int | None) -> list[Tensor]:
        """Read buffers, as many as the memory allows, between 2 and 4."""
        largest = max((tile.nbytes for output in self.outputs for tile in _tiles(output, False)), default=0)
        count = _BUFFERS
        if max_memory is not None:
            work = 4 * largest * (2 if any(o.info.dtype in ("F32", "F64") for o in self.outputs) else 4)
            need = _resident_memory() + work
            count = min(_BUFFERS, (max_memory - need) // max(2 * largest, 1))
            if count < 2:
                want = f"at least {-(-(need + 4 * largest) // 1_000_000)} MB"
                raise refuse("MEMORY", "too little for two tiles", wanted=want, got=f"{max_memory // 1_000_000} MB")
        return [torch.empty(largest, dtype=torch.uint8) for _ in range(count)]

    # Writing -----------------------------------------------------------------------------------------------------

    def write_shard(
        self, partial: Partial, shard: Shard, buffers: list[Tensor], verify: bool, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Fill one shard and put its line in the journal."""
        names = {entry.name for entry in shard.entries}
        ordered = {output.name: output for output in self.outputs if output.name in names}
        inputs: dict[str, Any] = {}
        writer = ShardWriter(partial.path / shard.file, shard, hashes=verify, sync=verify)
        done = 0

        def read(tile: _Tile, buffer: Tensor) -> None:
            self._read(tile, buffer)
            if verify and not tile.measure and not tile.output.copied and self._from_base(tile.output):
                digest = inputs.setdefault(tile.output.name, hashlib.sha256())
                digest.update(as_bytes(buffer[: tile.nbytes]))

        def write(tile: _Tile, piece: Tensor) -> None:
            nonlocal done
            writer.write(tile.output.name, piece)
            done += piece.nbytes
            progress(done)

        tiles = (
            tile for entry in shard.entries for tile in _tiles(ordered[entry.name], self._twice(ordered[entry.name]))
        )
        try:
            pipeline(tiles, read, self._compute, write, buffers)
        except BaseException:
            writer.abandon()
            raise
        outputs = writer.close()
        hashed = {name: digest.hexdigest() for name, digest in inputs.items()}
        copied = {name: outputs[name] for name, output in ordered.items() if output.copied and name in outputs}
        line = {"file": shard.file, "inputs": hashed | copied, "outputs": outputs}
        partial.append(json.dumps(line))
        return line

    def _from_base(self, output: _Output) -> bool:
        return output.site is None or (output.site.replacement is None and output.site.source == output.name)

    def _read(self, tile: _Tile, buffer: Tensor) -> None:
        info = tile.output.info
        target = as_bytes(buffer[: tile.nbytes])
        if info.file == self.layout.path and self.checkpoint.in_memory:
            site = tile.output.site
            key = site.replacement if site else None
            assert key is not None
            whole = as_bytes(self.checkpoint.tensor(key).contiguous())
            target[:] = whole[tile.start : tile.start + tile.nbytes]
            return
        fd = os.open(info.file, os.O_RDONLY)
        try:
            read_into(fd, target, info.start + tile.start)
        finally:
            os.close(fd)

    def _twice(self, output: _Output) -> bool:
        """Whether some vector that an adapter normalises lies in more than one tile of this output."""
        return any(
            (adapter := self.layout.adapters[patch.module]).kind in ("dora", "d2lora")
            and adapter.form != "update"
            and (adapter.along == "out_features") == patch.transposed
            for patch in (output.site.patches if output.site else ())
        )

    def _compute(self, tile: _Tile, buffer: Tensor) -> Tensor | None:
        raw = buffer[: tile.nbytes]
        if tile.output.copied:
            return raw
        stored = raw.view(DTYPES[tile.output.info.dtype])
        if tile.output.info.dtype not in FLOATS:
            return stored
        values = self._working_copy(stored, tile.output.work_dtype)
        site = tile.output.site
        if tile.patch is not None:
            base_weight = self._oriented(values, tile)
            delta = self._delta(tile, tile.patch, base_weight)
            if delta is None:
                return None
            merged = delta.add_(base_weight)
            values = (merged.T if tile.patch.transposed else merged).reshape(-1)
        if site is not None and site.bias is not None:
            values = values + self._bias(site.bias, tile, values)
        result = self._rounded_into(raw, values, DTYPES[tile.output.dtype])
        if site is not None and site.rows is not None:
            self._put_rows(site, tile, result)
        if site is not None or tile.output.dtype != tile.output.info.dtype:
            self._check_finite(tile, values, result)
        return result

    def _working_copy(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tile in the dtype of the work; on a CPU always in the same memory, which costs no page faults."""
        if self.device.type != "cpu":
            return stored.to(self.device, dtype)
        if self.workspace.dtype != dtype or self.workspace.numel() < stored.numel():
            self.workspace = torch.empty(stored.numel(), dtype=dtype)
        return self.workspace[: stored.numel()].copy_(stored)

    def _rounded_into(self, raw: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded once; over the bytes that were read where it fits, since nobody needs them any more."""
        if values.numel() * dtype.itemsize > raw.numel():
            wider = rounded(values, dtype).cpu()
            return wider.clone() if wider is values else wider  # the next tile needs the workspace
        once = rounded(values, dtype) if values.dtype == torch.float64 else values  # copy_ rounds float32 once
        return raw[: values.numel() * dtype.itemsize].view(dtype).copy_(once)

    def _oriented(self, values: Tensor, tile: _Tile) -> Tensor:
        """The tile as an (out_features, in_features) matrix."""
        assert tile.patch is not None
        matrix = values.view(tile.last - tile.first, -1)
        return matrix.T if tile.patch.transposed else matrix

    def _delta(self, tile: _Tile, patch: Patch, base_weight: Tensor) -> Tensor | None:
        """strength·delta of the tile; None when the tile only adds to its vectors' triples."""
        whole = self._adapter(patch)
        rows = slice(tile.first - patch.start, tile.last - patch.start)
        part = whole.take(in_=rows) if patch.transposed else whole.take(out=rows)
        if tile.measure:
            found = part.triple(base_weight)
            self.triples[patch] = self.triples[patch].plus(found) if patch in self.triples else found
            return None
        try:
            delta = part.delta(base_weight, self.triples.get(patch))
        except D2SurgeryError as error:
            rows_are_vectors = (part.along == "out_features") is not patch.transposed
            counting = f", counting from row {tile.first} of {tile.output.name}" if rows_are_vectors else ""
            where = f"{patch.module}{counting}"
            raise D2SurgeryError(*(replace(problem, module=where) for problem in error.problems)) from None
        return delta if self.strength == 1 else delta.mul_(self.strength)

    def _adapter(self, patch: Patch) -> Adapter:
        key = (patch.module, patch.expert, patch.out)
        if self.current is None or self.current[0] != key:
            self.triples = {p: t for p, t in self.triples.items() if p.module == patch.module}
            adapter = self.checkpoint.adapter(patch.module, patch.expert).take(out=slice(*patch.out))
            self.current = (key, adapter.to(self.device))
        return self.current[1]

    def _bias(self, module: str, tile: _Tile, values: Tensor) -> Tensor:
        scaling = self.layout.adapters[module].scaling
        assert scaling is not None
        first = tile.start * 8 // BITS[tile.output.info.dtype]
        bias = self.checkpoint.bias(module).to(values.device, torch.float64) * (scaling * self.strength)
        return bias[first : first + values.numel()].to(values.dtype)

    def _put_rows(self, site: Site, tile: _Tile, result: Tensor) -> None:
        """Replace the trained rows that lie in this tile, which need not begin or end at a row."""
        assert site.rows is not None
        trained = self.checkpoint.tensor(site.rows.key)
        trained = rounded(trained, result.dtype).reshape(trained.shape[0], -1)
        first = tile.start * 8 // BITS[tile.output.info.dtype]
        width = trained.shape[1]
        for number, row in enumerate(site.rows.indices):
            low, high = max(row * width, first), min((row + 1) * width, first + result.numel())
            if low < high:
                result[low - first : high - first] = trained[number, low - row * width : high - row * width]

    def _check_finite(self, tile: _Tile, values: Tensor, result: Tensor) -> None:
        if _all_finite(result):
            return
        overflow = _all_finite(values)  # the adapter is known to be finite
        if tile.output.site is None and not overflow:
            return  # as it was in the base
        message = f"a merged value overflows {tile.output.dtype}" if overflow else "the base holds NaN or infinity"
        raise refuse("NOT_FINITE", message, module=tile.output.name)

    # The other files ---------------------------------------------------------------------------------------------

    def write_files(self, partial: Partial, files: list[Shard]) -> dict[str, str]:
        """Index, config, tokenizer and the like. Returns their sha256."""
        index = index_bytes(files)
        contents = dict([index] if index else [])
        for path in sorted(self.base.directory.iterdir()):
            left_out = path.name in ("README.md", RECEIPT) or path.name.startswith(".")
            if path.is_file() and not left_out and not path.name.endswith(_WEIGHT_SUFFIXES):
                contents[path.name] = path.read_bytes()
        if self.landing.vocab_size is not None:
            for path in sorted(self.layout.path.parent.iterdir()):
                if path.name.startswith(_TOKENIZER_FILES):
                    contents[path.name] = path.read_bytes()
        if self.base.config:
            contents["config.json"] = json.dumps(self._config(), indent=2).encode() + b"\n"
        for name, content in contents.items():
            partial.write(name, content)
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}

    def _config(self) -> dict[str, Any]:
        """The base's config with what merging changed: the tie, the vocabulary, the dtype, a new head's labels."""
        config = dict(self.base.config)
        changes: dict[str, Any] = {}
        if self.landing.untied:
            changes["tie_word_embeddings"] = False
        if self.landing.vocab_size is not None:
            changes["vocab_size"] = self.landing.vocab_size
        if self.dtype is not None:
            name = str(DTYPES[self.dtype]).removeprefix("torch.")
            changes |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text | {key: value for key, value in changes.items() if key in text}
            changes.pop("vocab_size", None)
        labels = self._new_labels()
        if labels is not None:
            changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            changes["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        return config | changes

    def _new_labels(self) -> int | None:
        """The classes of a classification head that the adapter brings and the base's config does not expect."""
        if self.layout.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
            return None
        heads = [self.landing.sites[n] for n in self.landing.sites if n.endswith(("score.weight", "classifier.weight"))]
        count = next((site.shape[0] for site in heads if site.source is None), None)
        return None if count == len(self.base.config.get("id2label") or (0, 1)) else count

    # Forecast ----------------------------------------------------------------------------------------------------

    def survival(
        self, buffers: list[Tensor], dtypes: tuple[str, ...], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Survival]]:
        """Per module and output dtype, from the deltas themselves."""
        found: dict[str, dict[str, Survival]] = {}
        adapted = [output for output in self.outputs if output.site and output.site.patches]
        total = sum(output.entry.nbytes for output in adapted)
        done = 0

        def compute(tile: _Tile, buffer: Tensor) -> Tensor | None:
            nonlocal done
            if tile.patch is not None:
                stored = buffer[: tile.nbytes].view(DTYPES[tile.output.info.dtype])
                base_weight = self._oriented(stored.to(self.device, tile.output.work_dtype), tile)
                delta = self._delta(tile, tile.patch, base_weight)
                if delta is not None:
                    sums = found.setdefault(tile.patch.module, dict.fromkeys(dtypes, Survival()))
                    for dtype in dtypes:
                        sums[dtype] += survival(base_weight, delta, DTYPES[dtype])
                    done += tile.nbytes
                    progress(done, total)
            return None

        tiles = (tile for output in adapted for tile in _tiles(output, self._twice(output)))
        pipeline(tiles, self._read, compute, lambda tile, piece: None, buffers)
        return found


def _tiles(output: _Output, twice: bool) -> Iterator[_Tile]:
    """The grid: fixed by shapes. Patches cover whole rows; what no patch covers is cut by bytes."""
    if output.site is None or not output.site.patches:
        step = TILE * BITS[output.info.dtype] // 8
        for start in range(0, output.info.nbytes, step):
            yield _Tile(output, start, min(step, output.info.nbytes - start))
        return
    rows, _ = output.site.matrix
    row_bytes = output.info.nbytes // rows
    for patch in output.site.patches:
        cuts = list(_cuts(patch.start, patch.stop, row_bytes * 8 // BITS[output.info.dtype]))
        for measure in (True, False) if twice and len(cuts) > 1 else (False,):
            for first, last in cuts:
                yield _Tile(output, first * row_bytes, (last - first) * row_bytes, first, last, patch, measure)


def _cuts(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about TILE entries; a short last range joins its neighbour."""
    step = max(TILE // max(width, 1), _LEAST_ROWS)
    while start < stop:
        last = start + step if stop - start >= 2 * step else stop if stop - start <= step * 3 // 2 else start + step
        yield start, last
        start = last


def _all_finite(values: Tensor) -> bool:
    """The extremes of a tensor with NaN are NaN; looking at them is thirty times faster than at every element."""
    return not values.numel() or all(map(isfinite, torch.aminmax(values)))


def _check_disk(partial: Partial, need: int) -> None:
    done = sum(path.stat().st_size for path in partial.path.iterdir()) if partial.path.exists() else 0
    free = shutil.disk_usage(_existing(partial.out)).free
    if need - done > free:
        raise refuse("DISK_FULL", "not begun", file=str(partial.out), wanted=f"{need - done} bytes", got=f"{free}")


def _hub_id(base_model: str | None) -> str | None:
    """The receipt holds no paths, which differ from one machine to the next."""
    return None if base_model is None or Path(base_model).is_absolute() else base_model


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_memory() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else _peak_memory()


class _one_thread:
    """One intra-op thread while reading and writing have threads of their own: more would fight over the cores."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
