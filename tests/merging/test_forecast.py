"""What merge and plan say of updates that are zero, and of those that rounding loses: by the formula in float64."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import f64, round_to
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import D2LoRA, DualLoRA, LoRA, from_adapters, merge, plan, save
from d2surgery.adapters import Adapter
from d2surgery.cli import main


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, scaling: float = 1.0, *, zero: str = "") -> LoRA:
    slots = {"A": normal(2, 48, seed=seed), "B": normal(64, 2, seed=seed + 1)}
    return LoRA(scaling=scaling, **{name: slot * (name != zero) for name, slot in slots.items()})


def inputs(folder: Path, adapters: dict[str, Adapter]) -> tuple[Path, Path]:
    (folder / "base").mkdir()
    base = {f"{module}.weight": normal(64, 48, seed=9 + at).to(torch.bfloat16) for at, module in enumerate(adapters)}
    save_file(base, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text("{}")
    own = {
        module: replace(each, **{n: t.clone() for n, t in each.slots().items()}) for module, each in adapters.items()
    }
    save(from_adapters(own), folder / "a")
    return folder / "base", folder / "a"


def test_zero_modules_are_named_and_no_nan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters: dict[str, Adapter] = {"a": lora(1), "b": lora(2, zero="B"), "c": lora(3, zero="A")}
    base, adapter = inputs(tmp_path, adapters)
    for report in (plan(base, adapter, tmp_path / "x"), merge(base, adapter, tmp_path / "out")):
        (said,) = [problem for problem in report.problems if problem.code == "ZERO_UPDATE"]
        assert said.severity == "warning"
        assert (said.message, said.module) == ("2 of 3 modules are zero", "b, c")
    assert main(["plan", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "y")]) == 0
    text = capsys.readouterr()
    assert "nan" not in text.out
    assert "2 of 3 modules are zero" in text.err


def test_an_adapter_that_learnt_nothing_is_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = inputs(tmp_path, {"one": lora(1, zero="B"), "two": lora(2, zero="B")})
    report = merge(base, adapter, tmp_path / "out")
    assert [problem.message for problem in report.problems] == ["2 of 2 modules are zero: merged, it is the base again"]
    merged, before = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(merged[name], before[name]) for name in before)
    assert main(["plan", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "y")]) == 0
    assert "nan" not in capsys.readouterr().out


def test_other_kinds_are_zero_where_their_formula_is(tmp_path: Path) -> None:
    A, B, none = normal(2, 48, seed=1), normal(64, 2, seed=2), torch.zeros(64, 2)
    duals: dict[str, Adapter] = {
        "zero": DualLoRA(A=A, B=none, C=A, D=B, scaling=1.0), "not": DualLoRA(A=A, B=B, C=A, D=none, scaling=1.0)
    }  # fmt: skip
    signed: dict[str, Adapter] = {
        "zero": D2LoRA(A_plus=A, B_plus=none, A_minus=A, B_minus=none, scaling=1.0),
        "not": D2LoRA(A_plus=A, B_plus=none, A_minus=A, B_minus=B, scaling=1.0),
    }
    for name, adapters in (("dual", duals), ("signed", signed)):
        (tmp_path / name).mkdir()
        base, adapter = inputs(tmp_path / name, adapters)
        report = plan(base, adapter, tmp_path / "x")
        assert [p.module for p in report.problems if p.code == "ZERO_UPDATE"] == ["zero"]
        assert report.survival["zero"]["BF16"].delta_squared == 0


def test_what_rounding_loses_is_said_with_the_dtype_that_helps(tmp_path: Path) -> None:
    """<round(W0 + delta) − W0, delta>/‖delta‖², in numpy, over all modules."""
    adapters: dict[str, Adapter] = {"one": lora(1, 1e-4), "two": lora(3, 3e-4), "three": lora(5, 2e-4)}
    base, adapter = inputs(tmp_path, adapters)
    inner = total = 0.0
    for module, weight in load_file(base / "model.safetensors").items():
        one = adapters[module.removesuffix(".weight")]
        assert isinstance(one, LoRA)
        W, delta = f64(weight), one.scaling * f64(one.B) @ f64(one.A)
        inner += float(((round_to(W + delta, "BF16") - round_to(W, "BF16")) * delta).sum())
        total += float((delta * delta).sum())
    for report in (
        merge(base, adapter, tmp_path / "out"),
        plan(base, adapter, tmp_path / "x"),
    ):
        (said,) = report.problems
        assert (said.code, said.severity) == ("LOW_SURVIVAL", "warning")
        assert f"{1 - inner / total:.0%} of the delta is lost in bf16" in said.message
        assert "--dtype fp32 all of it" in said.message
        assert said.module.startswith("one (")
    receipt = json.loads((tmp_path / "out/d2surgery_merge.json").read_text())
    assert [problem["code"] for problem in receipt["problems"]] == ["LOW_SURVIVAL"]
    assert merge(base, adapter, tmp_path / "wide", dtype="F32").problems == ()


def test_of_many_modules_a_sample_is_looked_at_and_that_is_said(tmp_path: Path) -> None:
    adapters: dict[str, Adapter] = {f"m{at:02}": lora(at, 1e-5) for at in range(20)}
    base, adapter = inputs(tmp_path, adapters)
    (said,) = merge(base, adapter, tmp_path / "out").problems
    assert "measured on rows of 7 of 20 modules" in said.message
    assert "measured" not in plan(base, adapter, tmp_path / "x").problems[0].message
