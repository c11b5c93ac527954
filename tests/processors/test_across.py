"""A merge made under one setting of the processor and its libraries, audited under another: every kind and dtype."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from longer import one_in
from processors.matrix import SETTINGS, environment, missing, used
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.auditing import audit
from d2surgery.auditing.receipts import verify_receipt
from d2surgery.checkpoint import from_adapters, save
from d2surgery.merging import merge
from d2surgery.merging.receipt import arithmetic

pytestmark = pytest.mark.numerical
KINDS = ("lora", "dora", "duallora", "d2lora")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
OTHERS = ("MKL compatible", "MKL as on Intel, SSE4.2")
SHAPE = (320, 512)
MODULES = 4
MERGE = f"""
import sys
from pathlib import Path
from d2surgery.merging import merge
inputs, out = map(Path, sys.argv[1:])
for kind in {KINDS}:
    for dtype in {tuple(DTYPES)}:
        merge(inputs / dtype, inputs / kind, out / f"{{kind}}-{{dtype}}")
"""


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """The same on every machine, as torch's own is not."""
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def make(kind: str, seed: int) -> Adapter:
    """A rank of 8 and an update of about a twentieth of the base."""
    (out, in_), s = SHAPE, 0.02 / 60
    A, B, C, D = (normal(*shape, seed=seed + i) for i, shape in enumerate([(8, in_), (out, 8)] * 2))
    if kind == "lora":
        return LoRA(A=A, B=B, scaling=s)
    if kind == "dora":
        return DoRA(A=A, B=B, scaling=s, magnitude=0.46 * (1 + normal(out, seed=seed + 4, scale=0.01)))
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C, D=D, scaling=s)
    return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D, scaling=s)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, dtype in DTYPES.items():
        (folder / name).mkdir()
        weights = {f"layers.{i}.proj.weight": normal(*SHAPE, seed=i, scale=0.02).to(dtype) for i in range(MODULES)}
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    for kind in KINDS:
        save(from_adapters({f"layers.{i}.proj": make(kind, 10 * i + 100) for i in range(MODULES)}), folder / kind)
    return folder


@pytest.fixture(scope="module", params=one_in(len(OTHERS), OTHERS))
def elsewhere(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merges of every kind and dtype as another library or processor makes them."""
    if reason := missing(SETTINGS[request.param]):
        pytest.skip(reason)
    if used(request.param)["sums"] == arithmetic(torch.device("cpu"))["sums"]:
        pytest.skip(f"{request.param}: is how this process computes")
    out = tmp_path_factory.mktemp("elsewhere")
    subprocess.run(
        [sys.executable, "-c", MERGE, str(inputs), str(out)], env=environment(SETTINGS[request.param]), check=True
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_from_elsewhere_passes_with_one_note(inputs: Path, elsewhere: Path, kind: str, dtype: str) -> None:
    merged = elsewhere / f"{kind}-{dtype}"
    found = audit(inputs / dtype, inputs / kind, merged)
    assert found.verdict == "pass"
    assert [reason.severity for reason in found.reasons] in ([], ["info"])
    bad = sum(module.mismatched_elements for module in found.modules.values())
    assert bad <= MODULES * SHAPE[0] * SHAPE[1] / 1024
    for reason in found.reasons:
        assert reason.code == "OTHER_ROUNDING"
        assert reason.message.startswith(f"{bad} of ")
        assert "another linear-algebra library or processor" in reason.message
    assert verify_receipt(merged, base=inputs / dtype, adapter=inputs / kind).verdict == "pass"


def test_some_of_them_differ(inputs: Path, elsewhere: Path, tmp_path: Path) -> None:
    """Or the test above would say nothing."""
    if used("as it is")["sums"] != arithmetic(torch.device("cpu"))["sums"]:
        pytest.skip("this process is a setting itself")
    merge(inputs / "BF16", inputs / "dora", tmp_path / "here")
    merge(inputs / "F16", inputs / "d2lora", tmp_path / "also here")
    pairs = [("here", "dora-BF16"), ("also here", "d2lora-F16")]
    assert any(bits(tmp_path / here) != bits(elsewhere / there) for here, there in pairs)


def test_a_touched_element_in_a_merge_from_elsewhere_is_named(inputs: Path, elsewhere: Path, tmp_path: Path) -> None:
    weights = load_file(elsewhere / "lora-F32" / "model.safetensors")
    weight = weights["layers.2.proj.weight"]
    weight[5, 11] = torch.nextafter(weight[5, 11], torch.tensor(9.0))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    found = audit(inputs / "F32", inputs / "lora", tmp_path)
    named = [reason for reason in found.reasons if reason.severity == "warning"]
    assert [reason.module for reason in named] == ["layers.2.proj"]
    assert "at [5, 11], by 1 unit in the last place" in named[0].message


def bits(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()
