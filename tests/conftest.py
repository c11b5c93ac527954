"""What tests share: `safetensors_bytes` writes a file by hand (not with the library under test), `adapter` a directory
with config and weights, `published` is the folder of real adapters beside the checkout, where there is one."""

import atexit
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from models import Built
    from speaking import Speaker

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: `pytest -n auto` has a process per core
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of child processes would compile the package again
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="d2surgery-cache-")  # nothing is kept among the user's own
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
settings.register_profile("d2surgery", deadline=None)  # a busy machine is no failure
settings.load_profile("d2surgery")

NUMERICAL = ("adapters", "measures", "merging", "auditing")  # folders of tests that arithmetic decides

SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "org/base"}
PAIR = {"base_model.model.layers.0.q.lora_A.weight": (2, 6), "base_model.model.layers.0.q.lora_B.weight": (4, 2)}

Shapes = Mapping[str, tuple[int, ...]]
WriteAdapter = Callable[..., Path]


def safetensors_bytes(
    shapes: Shapes, dtypes: Mapping[str, str] | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file of zeros."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "F32")
        start, end = end, end + prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in NUMERICAL:
            item.add_marker(pytest.mark.numerical)


@pytest.fixture
def adapter(tmp_path: Path) -> WriteAdapter:
    """adapter(shapes, config | None, dtypes=…, metadata=…) -> directory."""

    def write(shapes: Shapes = PAIR, config: Mapping[str, Any] | None = LORA, **options: Any) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(shapes, **options))
        if config is not None:
            (directory / "adapter_config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def published() -> Path:
    """The folder of real adapters trained by others; they are not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "adapters"
    if not folder.is_dir():
        pytest.skip("the published adapters are not on this machine")
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Built]":
    """built(name) -> the case of that name in `models`, saved by transformers and PEFT, once per session."""
    from models import CASES, Built  # transformers and peft, which most tests do without

    made: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in made:
            made[name] = Built(CASES[name], tmp_path_factory.mktemp(name.replace(" ", "_")))
        return made[name]

    return build


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str, str], Speaker]":
    """speaker(kind, dtype) -> a small model that reads bytes, its adapter and their merge, once per session."""
    import speaking  # transformers, which most tests do without

    made: dict[tuple[str, str], Speaker] = {}

    def build(kind: str, dtype: str) -> "Speaker":
        if (kind, dtype) not in made:
            made[kind, dtype] = speaking.build(tmp_path_factory.mktemp(f"{kind}-{dtype}"), kind, dtype)
        return made[kind, dtype]

    return build
