"""Files of each format with one thing wrong: nothing is dropped silently, nothing raises, no weight is another.

`python tests/formats/test_mutated.py 2000` tries so many of each.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file
from toy_llama import DORA, LORA, save, toy

from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import Layout
from d2surgery.placement.sites import sites

PATHS = [f"model.layers.0.{name}.weight" for name in toy_llama.SHAPES]
BASE = {
    name: TensorInfo(Path(), "F32", shape, 0, 0) for name, shape in zip(PATHS, toy_llama.SHAPES.values(), strict=True)
}
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str, random.Random], bool]
"""Changes the tensors at a key; whether the file must then be refused."""


def dropped(tensors: Tensors, key: str, rng: random.Random) -> bool:
    del tensors[key]
    return not key.endswith(".alpha")


def emptied(tensors: Tensors, key: str, rng: random.Random) -> bool:
    tensors[key] = torch.zeros(0, 4)
    return True


def flattened(tensors: Tensors, key: str, rng: random.Random) -> bool:
    was = tensors[key]
    tensors[key] = was.reshape(-1)
    return was.dim() == 2


def turned(tensors: Tensors, key: str, rng: random.Random) -> bool:
    was = tensors[key]
    tensors[key] = was.T if was.dim() == 2 else was
    return was.dim() == 2 and 1 not in was.shape


def whole_numbers(tensors: Tensors, key: str, rng: random.Random) -> bool:
    tensors[key] = tensors[key].to(torch.int8)
    return bool(tensors[key].dim())


def renamed(tensors: Tensors, key: str, rng: random.Random) -> bool:
    """Another leaf: one letter of its last part."""
    at = rng.randrange(key.rindex(".") + 1, len(key))
    tensors[key[:at] + "X" + key[at + 1 :]] = tensors.pop(key)
    return True


def shortened(tensors: Tensors, key: str, rng: random.Random) -> bool:
    was = tensors[key]
    tensors[key] = was[:-1] if was.dim() and len(was) > 1 else was
    return bool(was.dim()) and len(was) > 1


def not_a_number(tensors: Tensors, key: str, rng: random.Random) -> bool:
    if tensors[key].dim():
        return False
    tensors[key] = torch.tensor(float("nan"))
    return True


def another_formats(tensors: Tensors, key: str, rng: random.Random) -> bool:
    leaf = rng.choice(
        [".lora_a", ".lora.down.weight", ".lora_magnitude_vector", ".hada_w1_a", ".lora_A", ".oft_blocks"]
    )
    name = f"unet.x{leaf}"
    tensors[name] = torch.ones(4, 8)
    return True


def twice(tensors: Tensors, key: str, rng: random.Random) -> bool:
    """A half of a module that the file has nothing else of."""
    tensors[key.replace("proj", "projs", 1)] = tensors[key]
    return True


CHANGES: list[Change] = [dropped, emptied, flattened, turned, whole_numbers, renamed, shortened, not_a_number,
                         another_formats, twice]  # fmt: skip
ARCHIVES = ("gguf", "mlx_old", "litgpt")
FORMATS = {**{f"lora {name}": (write, False) for name, write in LORA.items() if name not in ARCHIVES},
           **{f"dora {name}": (write, True) for name, write in DORA.items()}}  # fmt: skip


def check(directory: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    write, dora = FORMATS[name]
    adapter = toy(dora)
    write(adapter, directory)
    (file,) = directory.glob("*.safetensors")
    tensors, metadata = load_file(file), dict(open_layout(file).header.metadata)
    change, key = rng.choice(CHANGES), rng.choice(sorted(tensors))
    refused = change(tensors, key, rng)
    save(tensors, file, metadata)
    layout = with_base(open_layout(directory), BASE, toy_llama.CONFIG)
    what = f"{name} {seed}: {change.__name__} {key}"
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(layout.header.tensors), what
    landing = sites(layout, Header((Path("base"),), BASE, {}), toy_llama.CONFIG)
    found = [problem for problem in (*layout.problems, *landing.problems) if problem.severity != "info"]
    errors = [problem for problem in found if problem.severity == "error"]
    bare = dora and change is dropped and key.endswith(".dora_scale")  # LyCORIS may mean it so
    assert bool(found if bare else errors) >= refused, what
    assert not layout.unread or errors, what
    _same_elsewhere(layout, adapter, key, what)


def _same_elsewhere(layout: Layout, adapter: toy_llama.Toy, key: str, what: str) -> None:
    """What the change did not touch is read as before."""
    checkpoint = Checkpoint(layout)
    for module in adapter.A:
        names = (module, module.removeprefix("model."), toy_llama.flat(module))
        if any(name in key for name in names) or module not in layout.adapters:
            continue
        if (layout.adapters[module].kind == "dora") != bool(adapter.m) or layout.adapters[module].scaling is None:
            continue
        W = adapter.W[module].astype(np.float64)
        found = W + checkpoint[module].delta(torch.from_numpy(W)).numpy()
        np.testing.assert_allclose(found, adapter.effective(module), rtol=2e-6, atol=2e-7, err_msg=what)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_with_one_thing_wrong_is_refused_and_the_rest_of_it_read(tmp_path: Path, name: str) -> None:
    for seed in range(80):
        check(tmp_path / str(seed), name, seed)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut off or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(changed), 900))
        if rng.random() < 0.7:
            changed[at] = rng.randrange(256)
        elif rng.random() < 0.5:
            del changed[at : at + rng.randint(1, 9)]
        else:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    return bytes(changed)


def check_bytes(directory: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    path = LORA[name](toy(), directory)
    file = next(path.glob("adapter*.[gn]*"))
    file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    try:
        layout = with_base(open_layout(path), BASE, toy_llama.CONFIG)
    except D2SurgeryError:
        return
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(layout.header.tensors), seed
    for module, entry in layout.adapters.items():
        if entry.scaling is not None:
            Checkpoint(layout).adapter(module)


@pytest.mark.parametrize("name", ["gguf", "mlx_old"])
def test_a_damaged_archive_is_refused_or_read(tmp_path: Path, name: str) -> None:
    for seed in range(150):
        check_bytes(tmp_path / str(seed), name, seed)


def main(count: Any) -> None:
    from tempfile import TemporaryDirectory

    for run, names in ((check, list(FORMATS)), (check_bytes, ["gguf", "mlx_old"])):
        for name in names:
            for seed in range(int(count)):
                with TemporaryDirectory() as directory:
                    run(Path(directory) / "x", name, seed)
            print(name, count)


if __name__ == "__main__":
    main(sys.argv[1])
