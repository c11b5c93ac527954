"""The weights of a model directory: which of its files they are, and their joint header."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2surgery.errors import D2SurgeryError, Problem, brief, raise_errors, refuse
from d2surgery.files.header import Header, TensorInfo, is_pickle, read_header
from d2surgery.files.held import Seen
from d2surgery.files.reading import read_json
from d2surgery.machine import uncollected

USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in its order; the first that is there holds the weights."""


def read_checkpoint_header(directory: Path, *, as_loaded: bool = False) -> Header:
    """The joint header of a model directory: its only file, or the shards of its index, as `find_weights` finds them.

    as_loaded: take what transformers takes: every tensor of every shard, of one in two shards the last shard's. What
    the index says otherwise is a warning then. Without it such an index raises.
    """
    header = _joint_header(directory, as_loaded)
    if not any(name.endswith(".scales") for name in header.tensors):
        return header
    from d2surgery.files.mlx_base import dequantized  # which few need

    return dequantized(header, _config(directory))


def _joint_header(directory: Path, as_loaded: bool) -> Header:
    found = find_weights(directory)
    if found is None:
        raise refuse("BAD_BASE", "no model.safetensors and no index", file=str(directory), got=_listing(directory))
    if not found.name.endswith(".index.json"):
        header = _read_weights(found)
        return replace(header, tensors=_once(header.tensors), problems=tuple(_other_set(found)))
    index, seen = found, Seen(found)
    weight_map = _weight_map(index)
    headers = {name: _shard(index, name) for name in sorted(set(weight_map.values()))}
    raise_errors(
        problem for header in headers.values() if isinstance(header, D2SurgeryError) for problem in header.problems
    )
    shards = {name: header for name, header in headers.items() if isinstance(header, Header)}
    tensors = {name: info for header in shards.values() for name, info in header.tensors.items()}
    problems = list(_misplaced(index, weight_map, shards))
    raise_errors(problems if not as_loaded else (problem for problem in problems if problem.module not in tensors))
    first = next(iter(shards.values()))
    files = tuple(file for header in shards.values() for file in header.files)
    every = (seen, *(file for header in shards.values() for file in header.seen))
    return Header(files, _once(tensors), first.metadata, problems=tuple(_as_warnings(problems)), seen=every)


def find_weights(directory: Path) -> Path | None:
    """The file or the index that transformers takes: what `transformers_weights` in the config names, then `USUAL`.

    Where there is none of these, a file that is alone with its ending, GGUF last; of several that differ in a variant
    (weights.fp16.safetensors beside weights.safetensors) the one without.
    """
    usual = (directory / name for name in (*_named(directory), *USUAL))
    return next((path for path in usual if path.is_file()), None) or next(
        filter(None, (_by_another_name(directory, ending) for ending in (".safetensors", ".bin", ".gguf"))), None
    )


def _named(directory: Path) -> tuple[str, ...]:
    """What a config says that the weights are called; nothing of it leads out of the directory."""
    said = _config(directory).get("transformers_weights")
    return (said,) if isinstance(said, str) and Path(said).name == said else ()


def _config(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / "config.json")
    except D2SurgeryError:  # a config that is not there, or cannot be read: whoever needs it says so
        return {}


def _by_another_name(directory: Path, ending: str) -> Path | None:
    files = sorted(directory.glob(f"*{ending}"))
    for name in ("pytorch_model", "diffusion_pytorch_model"):
        for path in (directory / f"{name}{ending}", directory / f"{name}{ending}.index.json"):
            if path.is_file():
                return path
    plain = [file for file in files if not any(_is_variant(file, other) for other in files)]
    return plain[0] if len(plain) == 1 and (ending != ".bin" or is_pickle(plain[0])) else None


def _other_set(found: Path) -> Iterator[Problem]:
    """That an index lies beside the one file, and names others."""
    index = found.with_name(f"{found.name}.index.json")
    if not index.is_file():
        return
    try:
        others = {*_weight_map(index).values()} - {found.name}
    except D2SurgeryError:  # it is not read
        others = set()
    if others:
        message = f"transformers takes {found.name}; other loaders take what the index names"
        yield Problem(code="TWO_SETS_OF_WEIGHTS", severity="warning", message=message, file=str(index))


def _misplaced(index: Path, weight_map: Mapping[str, str], shards: Mapping[str, Header]) -> Iterator[Problem]:
    """Tensors that are not where the index says, or in two places."""
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            yield Problem(code="MISSING_SHARD", message=f"{name} is not in {shard}", file=str(index), module=name)
    count = Counter(name for header in shards.values() for name in header.tensors)
    if twice := [name for name, times in count.items() if times > 1]:
        message = "a tensor stands in two shards"
        yield Problem(code="DUPLICATE_KEY", message=message, file=str(index), module=twice[0])


def _as_warnings(problems: Iterable[Problem]) -> Iterator[Problem]:
    return (replace(problem, code="INDEX_DISAGREES", severity="warning") for problem in problems)


def _once(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of tensors that are the same bytes, as ties are in a pickle, the first: safetensors has one of them, too."""
    seen = {info: name for name, info in reversed([*tensors.items()]) if info.nbytes}
    return {name: info for name, info in tensors.items() if seen.get(info, name) == name}


def _is_variant(file: Path, other: Path) -> bool:
    return file != other and file.name.startswith(f"{other.stem}.")


def _read_weights(path: Path) -> Header:
    if path.suffix == ".gguf":
        from d2surgery.files.gguf_base import read_gguf_base  # its names, which few need

        return read_gguf_base(path)
    if path.suffix != ".bin":
        return read_header(path)
    with uncollected():  # torch, and only here
        from d2surgery.files.pickled import locate_pickled

    return locate_pickled(path)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("BAD_BASE", "the index has no weight_map", file=str(index))
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or len(os.fsencode(shard)) > 255 or "\0" in shard:
            raise refuse(
                "BAD_BASE", "not the name of a file beside the index", file=str(index), module=name, got=brief(shard)
            )
    return weight_map


def _shard(index: Path, name: str) -> Header | D2SurgeryError:
    path = index.parent / name
    if not path.exists():
        return refuse("MISSING_SHARD", f"the index names {name}, which is not there", file=str(index))
    try:
        return _read_weights(path)
    except D2SurgeryError as error:
        return error


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return "not a directory"
    return ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "an empty directory"
