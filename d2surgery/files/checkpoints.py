"""The weights of a model directory: which of its files they are, and their joint header."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from d2surgery.errors import D2SurgeryError, Problem, brief, raise_errors, refuse
from d2surgery.files.header import Header, TensorInfo, is_pickle, read_header
from d2surgery.files.held import Seen
from d2surgery.files.reading import read_json


def read_checkpoint_header(directory: Path) -> Header:
    """The joint header of a model directory: its only file, or the shards of its index.

    In this order: safetensors, then what torch.save wrote; of files that differ in a variant (model.fp16.safetensors
    beside model.safetensors) the one without.
    """
    found = next(filter(None, (_weights_in(directory, ending) for ending in (".safetensors", ".bin"))), None)
    if found is None:
        raise refuse("BAD_BASE", "no model.safetensors and no index", file=str(directory), got=_listing(directory))
    if not found.name.endswith(".index.json"):
        header = _read_weights(found)
        return replace(header, tensors=_once(header.tensors))
    index, seen = found, Seen(found)
    weight_map = _weight_map(index)
    headers = {name: _shard(index, name) for name in sorted(set(weight_map.values()))}
    raise_errors(
        problem for header in headers.values() if isinstance(header, D2SurgeryError) for problem in header.problems
    )
    shards = {name: header for name, header in headers.items() if isinstance(header, Header)}
    tensors = {name: info for header in shards.values() for name, info in header.tensors.items()}
    problems = [
        Problem(code="MISSING_SHARD", message=f"{name} is not in {shard}", file=str(index))
        for name, shard in weight_map.items()
        if name not in shards[shard].tensors
    ]
    counts = sum(len(header.tensors) for header in shards.values())
    if counts != len(tensors):
        problems.append(Problem(code="DUPLICATE_KEY", message="a tensor stands in two shards", file=str(index)))
    raise_errors(problems)
    first = next(iter(shards.values()))
    files = tuple(file for header in shards.values() for file in header.files)
    every = (seen, *(file for header in shards.values() for file in header.seen))
    return Header(files, _once(tensors), first.metadata, seen=every)


def _weights_in(directory: Path, ending: str) -> Path | None:
    """The index or the one file of weights with this ending."""
    named = ("model", "pytorch_model", "diffusion_pytorch_model")
    files = sorted(directory.glob(f"*{ending}"))
    for name in named:
        if (index := directory / f"{name}{ending}.index.json").exists():
            return index
        if (file := directory / f"{name}{ending}") in files:
            return file
    plain = [file for file in files if not any(_is_variant(file, other) for other in files)]
    return plain[0] if len(plain) == 1 and (ending == ".safetensors" or is_pickle(plain[0])) else None


def _once(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of tensors that are the same bytes, as ties are in a pickle, the first: safetensors has one of them, too."""
    seen = {info: name for name, info in reversed([*tensors.items()]) if info.nbytes}
    return {name: info for name, info in tensors.items() if seen.get(info, name) == name}


def _is_variant(file: Path, other: Path) -> bool:
    return file != other and file.name.startswith(f"{other.stem}.")


def _read_weights(path: Path) -> Header:
    if path.suffix != ".bin":
        return read_header(path)
    from d2surgery.files.pickled import locate_pickled  # torch, and only here

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
