"""One merge at work: tiles through the pipeline, shards, the receipt."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from d2surgery.cards import CARD, RECEIPT, of_merge
from d2surgery.errors import D2SurgeryError, Problem, raise_errors, refuse
from d2surgery.files.held import changes, naming
from d2surgery.files.partial import Partial
from d2surgery.files.tensors import as_bytes
from d2surgery.files.writer import Shard, ShardWriter, free_space, hash_tensors, index_file, shards
from d2surgery.machine import one_thread
from d2surgery.merging.companions import Companions
from d2surgery.merging.forecast import low_survival, sampled, zero_updates
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.receipt import receipt_of, recipe_of
from d2surgery.merging.tiles import Output, Steps


class Written(NamedTuple):
    """What a merge has made: bytes of weights, what is to be said, the sha256 of the base's tensors by name."""

    nbytes: int
    problems: tuple[Problem, ...]
    inputs: Mapping[str, str]


def write(
    prepared: Prepared,
    partial: Partial,
    companions: Companions,
    hashed_ahead: Callable[[], Mapping[str, str]],
    max_memory: int | None,
    shard_size: int,
    verify: bool,
    progress: Callable[[int, int], None],
) -> Written:
    """Write and publish the merged checkpoint.

    hashed_ahead() gives the sha256 of those tensors of the base for which they are known when tiles begin.
    """
    files = shards((output.entry for output in prepared.outputs), shard_size)
    total = sum(shard.nbytes for shard in files)
    names = {*(shard.file for shard in files), *companions.files, *index_file(files), "config.json", RECEIPT, CARD}
    with one_thread():
        adapter_hashes, zero = prepared.check_adapter(hashes=verify)
        recipe = recipe_of(prepared, shard_size, verify, adapter_hashes)
        threads = prepared.threads(max_memory)
        _check_disk(partial, total)
        published = partial.begin(recipe, names)
        known = hashed_ahead()
        said = [*zero_updates(prepared, zero), *low_survival(prepared, sampled(prepared))]
        problems = (*prepared.fit.problems, *said)
        if published:
            return Written(total, problems, {})
        written = 0
        inputs: dict[str, str] = {}
        outputs: dict[str, str] = {}

        def advance(done: int) -> None:
            progress(written + done, total)

        for shard in files:
            line = partial.finished.get(shard.file)
            if line is None or hash_tensors(partial.path / shard.file, shard) != line["outputs"]:
                line = _write_shard(prepared, partial, shard, threads, known, verify, advance)
            inputs |= line["inputs"]
            outputs |= line["outputs"]
            written += shard.nbytes
            progress(written, total)
    beside = companions.contents(prepared.fit, prepared.dtype) | index_file(files)
    prepared.refuse_changes()
    raise_errors(changes(companions.files.values(), "COMPANION_CHANGED"))
    for name, content in beside.items():
        partial.write(name, content)
    receipt = receipt_of(prepared, recipe, adapter_hashes, inputs, outputs, beside, problems)
    partial.write(RECEIPT, json.dumps(receipt, indent=1).encode())
    partial.write(CARD, of_merge(receipt).encode())
    partial.publish()
    return Written(total, problems, inputs)


def _write_shard(
    prepared: Prepared,
    partial: Partial,
    shard: Shard,
    threads: int,
    known: Mapping[str, str],
    verify: bool,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Fill one shard and put its line in the journal. `known` are sha256 of tensors of the base."""
    outputs = {output.name: output for output in prepared.outputs}
    ordered = [outputs[entry.name] for entry in shard.entries]
    computed = {output.name for output in ordered if verify and _computed(output)}
    unknown = computed - known.keys()
    with naming(path := partial.path / shard.file):
        fd = partial.create(shard.file)
    writer = ShardWriter(path, shard, hashes=verify, sync=verify, fd=fd)

    def write_tensor(steps: Steps) -> str:
        """The sha256 of what it is computed from, unless that is known."""
        digest = hashlib.sha256()
        for tile, stored in steps:
            if tile.output.name in unknown:
                digest.update(as_bytes(stored))
            writer.write(tile.output.name, prepared.merger.merge(tile, stored))
        return digest.hexdigest()

    try:
        work = [(output, write_tensor) for output in ordered]
        digests = list(prepared.merger.over(work, threads, progress))
    except BaseException as error:
        writer.abandon()
        if isinstance(error, D2SurgeryError):
            prepared.refuse_changes()  # what is wrong with the numbers may be that they are others now
        raise
    written = writer.close()
    prepared.refuse_changes()
    read = {output.name: digest for output, digest in zip(ordered, digests, strict=True)}
    inputs = {name: known.get(name, read[name]) for name in computed}
    inputs |= {output.name: written[output.name] for output in ordered if verify and output.copied}
    line = {"file": shard.file, "inputs": inputs, "outputs": written}
    partial.append(json.dumps(line))
    return line


def _computed(output: Output) -> bool:
    """Whether it is made of the base's tensor of the same name, and not copied."""
    if output.site is None:
        return not output.copied
    return output.site.replacement is None and output.site.source == output.name


def _check_disk(partial: Partial, need: int) -> None:
    done = sum(path.lstat().st_size for path in partial.path.iterdir()) if partial.path.is_dir() else 0
    free = free_space(partial.out)
    if need - done > free:
        raise refuse("DISK_FULL", "not begun", file=str(partial.out), wanted=f"{need - done} bytes", got=f"{free}")
