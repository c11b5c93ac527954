"""What a changed file is given to, and what must hold then: our error or a result that drops nothing."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from mutate import (
    mutated_archive,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_pickle,
    mutated_safetensors,
    mutated_toml,
)
from safetensors import SafetensorError, safe_open
from world import ADAPTER, OURS, RUN

from d2surgery.auditing import audit
from d2surgery.auditing.receipts import verify_receipt
from d2surgery.checkpoint import load
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.items import read_items, read_prompts
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import read_header
from d2surgery.files.unpickling import unpickle
from d2surgery.formats import open_layout
from d2surgery.merging import merge
from d2surgery.training.config import read_config

Target = Callable[[Path, Random], None]


class Dropped(AssertionError):
    """Something that the file holds is neither used nor named."""


def silently(*arguments: str) -> int:
    """The command line in this process; what it says must be free of raw escapes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments])
    said = out.getvalue() + err.getvalue()
    if "UNFORESEEN" in said:
        raise AssertionError(said[:300])
    if "\x1b" in said:
        raise AssertionError(f"a raw escape: {said[said.index(chr(27)) :][:60]!r}")
    return code


@contextlib.contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """The file with other bytes for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def check_layout(path: Path) -> None:
    """Every tensor of the file is accounted for once, or unread and named by an error."""
    layout = open_layout(path)
    keys = list(layout.header.tensors)
    accounted = list(layout.accounted())
    if sorted([*accounted, *layout.unread]) != sorted(keys):
        raise Dropped(f"{set(keys) ^ {*accounted, *layout.unread}}")
    if layout.unread and not any(problem.severity == "error" for problem in layout.problems):
        raise Dropped(f"unread without an error: {layout.unread}")
    if layout.path.suffix == ".safetensors":
        same_as_safetensors(layout.path)


def same_as_safetensors(path: Path) -> None:
    """What we read of a header is what the library reads."""
    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Dropped(f"safetensors refuses it: {error}") from None
    if theirs != {name: info.shape for name, info in header.tensors.items()}:
        raise Dropped(f"{theirs.keys() ^ header.tensors.keys()}")


# Targets -------------------------------------------------------------------------------------------------------------


def header(world: Path, random: Random) -> None:
    path = world / random.choice(["peft", "lora", "dora", "ours"]) / "adapter_model.safetensors"
    with changed(path, mutated_safetensors(path.read_bytes(), random)):
        check_layout(path.parent)


def adapter_config(world: Path, random: Random) -> None:
    name, config = random.choice([("peft", ADAPTER), ("ours", OURS)])
    path = world / name / "adapter_config.json"
    with changed(path, mutated_json(config, random)):
        check_layout(path.parent)
        if random.random() < 0.2:
            load(path.parent)


def inspecting(world: Path, random: Random) -> None:
    """The command itself, as text, as JSON, with a base and with numbers."""
    directory = world / random.choice(["peft", "ours", "lora", "bin"])
    path = random.choice([*directory.iterdir()])
    data = path.read_bytes()
    new = mutated_json(json.loads(data), random) if path.suffix == ".json" else (
        mutated_safetensors(data, random) if path.suffix == ".safetensors" else mutated_archive(data, random)
    )  # fmt: skip
    more = random.choice([[], ["--json"], ["--per-layer"], ["--base", str(world / "base")], ["--numbers"], ["--quiet"]])
    with changed(path, new):
        assert silently("inspect", str(directory), *more) in (0, 1, 2)


def pickled(world: Path, random: Random) -> None:
    path = world / random.choice(["bin", "bin", "old"]) / "adapter_model.bin"
    with changed(path, mutated_archive(path.read_bytes(), random)):
        check_layout(path.parent)


def opcodes(world: Path, random: Random) -> None:
    import zipfile

    with zipfile.ZipFile(world / "bin" / "adapter_model.bin") as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    with contextlib.suppress(ValueError):
        unpickle(mutated_pickle(mutated_pickle(data, random), random))


def base(world: Path, random: Random) -> None:
    """config.json and the index of a base."""
    directory = world / "shards"
    path = directory / random.choice(["config.json", "config.json", "model.safetensors.index.json"])
    with changed(path, mutated_json(json.loads(path.read_text()), random)):
        assert silently("inspect", str(world / "peft"), "--base", str(directory)) in (0, 1, 2)
        weights = BaseWeights(directory)
        indexed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        if set(indexed) - set(weights.header.tensors):
            raise Dropped(f"{set(indexed) - set(weights.header.tensors)}")


def shard(world: Path, random: Random) -> None:
    path = random.choice(sorted((world / "shards").glob("*.safetensors")))
    with changed(path, mutated_safetensors(path.read_bytes(), random)):
        assert silently("inspect", str(world / "peft"), "--base", str(path.parent)) in (0, 1, 2)


def toml(world: Path, random: Random) -> None:
    path = world / "run.toml"
    with changed(path, mutated_toml(RUN, random)):
        read_config(path)


def items(world: Path, random: Random) -> None:
    path = world / random.choice(["items.jsonl", "items.json"])
    data = path.read_bytes()
    new = mutated_lines(data, random) if path.suffix == ".jsonl" else mutated_json(json.loads(data), random)
    if random.random() < 0.2:
        import gzip

        new = gzip.compress(new, mtime=0)
        new = mutated_bytes(new, random) if random.random() < 0.5 else new
    with changed(path, new):
        random.choice([read_items, read_prompts])(path)


def merging(world: Path, random: Random) -> None:
    """A merge of a changed adapter, or onto a base one of whose small files changed: all of the base is in it."""
    directory = world / random.choice(["lora", "peft", "dora", "base"])
    path = random.choice([path for path in directory.iterdir() if directory.name != "base" or path.suffix == ".json"])
    data, out = path.read_bytes(), world / "merging"
    new = mutated_json(json.loads(data), random) if path.suffix == ".json" else mutated_safetensors(data, random)
    adapter = world / "lora" if directory.name == "base" else directory
    try:
        with changed(path, new):
            merge(world / "base", adapter, out, verify=random.random() < 0.5)
            lost = set(BaseWeights(world / "base").header.tensors) - set(BaseWeights(out).header.tensors)
        if lost:
            raise Dropped(f"{lost}")
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(world / ".merging.partial", ignore_errors=True)


def receipt(world: Path, random: Random) -> None:
    path = world / "merged" / "d2surgery_merge.json"
    with changed(path, mutated_json(json.loads(path.read_text()), random)):
        verify_receipt(world / "merged", base=world / "base", adapter=world / "lora")


def auditing(world: Path, random: Random) -> None:
    """The audit of a directory one of whose files changed, by the command, whose exit code is a verdict or 2."""
    path = random.choice([path for path in (world / "merged").iterdir() if path.suffix in (".json", ".safetensors")])
    data = path.read_bytes()
    new = mutated_json(json.loads(data), random) if path.suffix == ".json" else mutated_safetensors(data, random)
    with changed(path, new):
        code = silently("audit", "--base", str(world / "base"), "--adapter", str(world / "lora"), "--merged",
                        str(world / "merged"), *random.choice([[], ["--json"]]))  # fmt: skip
        assert code in (0, 1, 2, 3)
        if path.suffix == ".safetensors" and random.random() < 0.2:
            audit(world / "base", world / "lora", world / "merged")


def journal(world: Path, random: Random) -> None:
    """`--resume` over a changed journal or file: it continues, refuses, or begins anew, and what stands is whole."""
    torn, out = world / ".again.partial", world / "again"
    shutil.copytree(world / ".resumed.partial", torn)
    path = random.choice([torn / "journal.jsonl", torn / "journal.jsonl", *torn.iterdir()])
    path.write_bytes((mutated_lines if path.name == "journal.jsonl" else mutated_bytes)(path.read_bytes(), random))
    try:
        merge(world / "base", world / "lora", out, shard_size=600, resume=True)
        if audit(world / "base", world / "lora", out).verdict != "pass":
            raise Dropped("a resumed merge that is not whole")
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(torn, ignore_errors=True)


TARGETS: dict[str, tuple[int, Target]] = {  # name -> (of a hundred inputs how many, target)
    "header": (22, header),
    "adapter_config": (20, adapter_config),
    "inspecting": (12, inspecting),
    "pickled": (8, pickled),
    "opcodes": (6, opcodes),
    "base": (6, base),
    "shard": (4, shard),
    "toml": (6, toml),
    "items": (6, items),
    "receipt": (4, receipt),
    "merging": (3, merging),
    "auditing": (2, auditing),
    "journal": (1, journal),
}


def one(world: Path, seed: int, only: str | None = None) -> tuple[str, BaseException | None]:
    """One input: the target's name and what it raised that is not ours. The seed decides all of it."""
    random = Random(seed)
    weights = [weight for weight, _ in TARGETS.values()]
    name = only or random.choices([*TARGETS], weights)[0]
    try:
        TARGETS[name][1](world, random)
    except D2SurgeryError:
        return name, None
    except Exception as error:
        return name, error
    return name, None
