"""What a notebook shows of public values: a line each, with the numbers that matter and without tensors."""

from pathlib import Path

from measuring import write_adapter, write_base

import d2surgery


def test_each_value_is_a_line(tmp_path: Path) -> None:
    base_path, adapter_path = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", "lora")
    base, checkpoint = d2surgery.BaseWeights(base_path), d2surgery.load(adapter_path)
    plan = d2surgery.plan(base_path, adapter_path, tmp_path / "out")
    d2surgery.merge(base_path, adapter_path, tmp_path / "out")
    modules, tensors = len(checkpoint), len(base)
    found = f"LoRA on {modules} modules, peft, 0 problems)"
    for value, words in [
        (checkpoint, f"Checkpoint({found}"),
        (checkpoint.layout, f"Layout({found}"),
        (next(d2surgery.spectra(checkpoint))[1], "Spectrum(delta, structural: rank used "),
        (next(d2surgery.drifts(checkpoint, base))[1], "Drift("),
        (plan, f"PlanReport({modules} modules into {tensors} tensors, "),
        (d2surgery.audit(base_path, adapter_path, tmp_path / "out"), f"Audit(pass: {modules} modules, {tensors} "),
        (base, f"BaseWeights({str(base_path)!r}, {tensors} tensors in 1 files)"),
    ]:
        assert repr(value).startswith(words)
        assert len(repr(value)) < 150 + len(str(tmp_path))
