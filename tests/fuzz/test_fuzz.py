"""A short part of the fuzz, and every field of every file as every type. `run.py` is the long part."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from mutate import VALUES, paths, replaced
from targets import TARGETS, changed, check_layout, one, silently
from world import ADAPTER, CONFIG, OURS, build

from d2surgery.auditing.receipts import verify_receipt
from d2surgery.errors import D2SurgeryError
from d2surgery.merging import merge

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs_of_every_target(world: Path, name: str) -> None:
    for seed in range(3 * TARGETS[name][0]):
        _, error = one(world, seed, name)
        if error is not None:
            raise AssertionError(f"python tests/fuzz/run.py --only {name} --seed {seed} --inputs 1") from error


# Every field of every type ------------------------------------------------------------------------------------------


def variants(content: Any) -> Iterator[tuple[tuple[str | int, ...], bytes]]:
    """Every field, however deep, as every value."""
    for at in paths(content):
        for value in VALUES:
            yield at, json.dumps(replaced(content, at, value)).encode()


def every_field(path: Path, content: Any, use: Callable[[], object], step: int = 1) -> None:
    """step: every so-manieth variant, where a use takes its time; the long part has the others."""
    for at, data in islice(variants(content), 0, None, step):
        with changed(path, data), contextlib.suppress(D2SurgeryError):
            try:
                use()
            except Exception as error:
                if isinstance(error, D2SurgeryError):
                    raise
                raise AssertionError(f"{path.name} {at}: {data[:200]!r}") from error


@pytest.mark.parametrize(("name", "config"), [("peft", ADAPTER), ("ours", OURS)])
def test_every_field_of_an_adapters_config(world: Path, name: str, config: Any) -> None:
    path = world / name / "adapter_config.json"
    every_field(path, config, lambda: check_layout(path.parent))


def test_every_field_of_a_models_config(world: Path) -> None:
    """A failed audit is the only thing that exits with 1; `inspect` does where the two do not fit."""
    path = world / "shards" / "config.json"
    text = CONFIG | {"text_config": {"model_type": "llama", "vocab_size": 16, "tie_word_embeddings": True}}
    every_field(path, text, lambda: silently("inspect", str(world / "peft"), "--base", str(path.parent)))


def test_every_field_of_an_index(world: Path) -> None:
    path = world / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    small = index | {"weight_map": dict([*index["weight_map"].items()][:2])}
    every_field(path, small, lambda: silently("inspect", str(world / "peft"), "--base", str(path.parent)))


def test_every_field_of_a_receipt(world: Path) -> None:
    path = world / "merged" / "d2surgery_merge.json"
    receipt = json.loads(path.read_text())
    for part in ("outputs", "base", "adapter"):
        receipt[part]["tensors"] = dict([*receipt[part]["tensors"].items()][:1])
    every_field(path, receipt, lambda: verify_receipt(path.parent, base=world / "base", adapter=world / "lora"), 11)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_fields_of_what_lies_beside_merged_weights(world: Path, name: str) -> None:
    """Every 41st: an audit takes its time. The long part has the others."""
    path = world / "merged" / name
    arguments = ("audit", "--base", str(world / "base"), "--adapter", str(world / "lora"), "--merged", str(path.parent))
    for number, (at, data) in enumerate(variants(json.loads(path.read_text()))):
        if number % 41 == 0:
            with changed(path, data):
                assert silently(*arguments) in (0, 1, 2, 3), at


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_fields_of_what_lies_beside_a_base(world: Path, name: str) -> None:
    path = world / "base" / name
    content = json.loads(path.read_text())
    for number, (_, data) in enumerate(variants(content)):
        if number % 29 == 0:
            with changed(path, data), contextlib.suppress(D2SurgeryError):
                merge(world / "base", world / "lora", world / f"out-{name}-{number}", verify=False)


def test_the_long_part_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--inputs", "6", "--jobs", "2", "--only", "toml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 inputs" in done.stdout
    assert "foreign 0, slow 0, large 0, dropped 0, died 0" in done.stdout
