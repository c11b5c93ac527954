"""What engines make of an adapter, and that what `convert --for` writes is applied as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import d2surgery
from d2surgery.cli import main
from d2surgery.formats.engines import ENGINES, lands

Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"


def lora(rank: int = 4, scaling: float = 0.5) -> d2surgery.LoRA:
    return d2surgery.LoRA(A=torch.randn(rank, 16), B=torch.randn(16, rank), scaling=scaling)


def dora() -> d2surgery.DoRA:
    return d2surgery.DoRA(A=torch.randn(4, 16), B=torch.randn(16, 4), magnitude=torch.rand(16), scaling=0.5)


def written(directory: Path, adapters: dict[str, Any], format: str = "peft", **config: Any) -> d2surgery.Layout:
    d2surgery.save(d2surgery.from_adapters(adapters), directory, format=format)
    if config:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return d2surgery.open_layout(directory)


def codes(layout: d2surgery.Layout, engine: str) -> list[str]:
    return [problem.code for problem in lands(layout, engine).problems]


def test_a_plain_lora_of_one_rank_is_applied_by_every_engine_that_reads_it(tmp_path: Path) -> None:
    layout = written(tmp_path, {Q: lora(), V: lora()})
    for name, engine in ENGINES.items():
        found = lands(layout, name)
        if "peft" in engine.formats:
            assert (found.applied, found.problems) == (2, ()), name
        else:
            assert [p.code for p in found.problems] == ["ENGINE_REFUSES"]
            assert (found.applied, f"--for {name}" in found.problems[0].wanted) == (0, True)


@pytest.mark.parametrize(("engine", "wrong"), [("vllm", ()), ("sglang", (Q, V)), ("lorax", ()), ("tgi", (Q, V))])
def test_rslora_is_misread_where_the_root_is_ignored(tmp_path: Path, engine: str, wrong: tuple[str, ...]) -> None:
    """alpha/√r was trained, alpha/r is applied."""
    layout = written(tmp_path, {Q: lora(), V: lora()}, use_rslora=True, lora_alpha=8)
    found = lands(layout, engine)
    assert [(p.module, p.wanted, p.got) for p in found.problems] == [(m, "scaling 4", "2") for m in wrong]


def test_patterns_are_ignored_by_vllm(tmp_path: Path) -> None:
    """What has the config's rank and alpha is right; another alpha, or another rank under one scaling, is not."""
    layout = written(tmp_path, {Q: lora(), V: lora(scaling=2.0), UP: lora(rank=8, scaling=0.25)})
    config = layout.about.settings
    usual = config["lora_alpha"] / config["r"]
    found = lands(layout, "vllm")
    wrong = {module for module, entry in layout.adapters.items() if entry.scaling != usual}
    assert {module for module, fate in found.fates.items() if fate == "misread"} == wrong != set()
    assert codes(layout, "sglang") == []


def test_dora_is_refused_served_as_lora_or_applied(tmp_path: Path) -> None:
    layout = written(tmp_path / "peft", {Q: dora()})
    assert (codes(layout, "vllm"), codes(layout, "fireworks")) == (["ENGINE_REFUSES"], ["ENGINE_MISREADS"])
    assert codes(layout, "diffusers") == []
    assert codes(written(tmp_path / "mlx", {Q: dora()}, "mlx"), "mlx") == []
    lycoris = written(tmp_path / "lycoris", {Q: dora()}, "lycoris")
    assert codes(lycoris, "comfyui") == ["ENGINE_MISREADS"]
    assert "norm of the base" in lands(lycoris, "comfyui").problems[0].message
    assert codes(lycoris, "diffusers") == ["ENGINE_MISREADS"]
    assert "dora_scale is left out" in lands(lycoris, "diffusers").problems[0].message


def test_lycoris_products_are_applied_by_comfyui_alone(tmp_path: Path) -> None:
    shapes = {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2), "w2_b": (2, 16)}
    save_file(
        {f"lycoris_x.hada_{leaf}": torch.randn(shape) for leaf, shape in shapes.items()}, tmp_path / "x.safetensors"
    )
    layout = d2surgery.open_layout(tmp_path / "x.safetensors")
    assert (codes(layout, "comfyui"), codes(layout, "diffusers")) == ([], ["ENGINE_REFUSES"])


def test_heads_other_modules_and_whole_tensors(tmp_path: Path) -> None:
    made = d2surgery.from_adapters({Q: lora(), "lm_head": lora(), "model.layers.0.other": lora()},
                                   replacements={"score.weight": torch.zeros(2, 16)})  # fmt: skip
    d2surgery.save(made, tmp_path)
    layout = d2surgery.open_layout(tmp_path)
    vllm, fireworks = lands(layout, "vllm").fates, lands(layout, "fireworks").fates
    assert vllm == {Q: "applied", "lm_head": "refused", "model.layers.0.other": "applied", "score.weight": "refused"}
    assert fireworks["model.layers.0.other"] == "dropped"


@pytest.mark.parametrize(("rank", "said"), [(16, []), (17, ["ENGINE_OPTION"]), (600, ["ENGINE_REFUSES"])])
def test_ranks_have_steps_and_an_end(tmp_path: Path, rank: int, said: list[str]) -> None:
    layout = written(tmp_path, {Q: lora(rank)})
    assert codes(layout, "vllm") == said
    if said == ["ENGINE_OPTION"]:
        assert lands(layout, "vllm").problems[0].message == "start vLLM with --max-lora-rank 32"


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.takes != "gguf"])
def test_what_is_written_for_an_engine_is_applied_as_it_was_trained(
    tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {Q: lora(4, 0.5), V: lora(8, 2.0), UP: lora(4, 3.0)}
    d2surgery.save(d2surgery.from_adapters(adapters), tmp_path / "mixed")
    assert main(["convert", str(tmp_path / "mixed"), str(tmp_path / "out"), "--for", engine]) == 0
    assert main(["inspect", str(tmp_path / "out"), "--for", engine]) == 0
    assert f"{ENGINES[engine].title} applies 3 of 3 as trained." in capsys.readouterr().out
    wanted, found = d2surgery.load(tmp_path / "mixed"), d2surgery.load(tmp_path / "out")
    for module in adapters:
        a, b = (each[module] for each in (wanted, found))
        torch.testing.assert_close(a.scaling * a.B @ a.A, b.scaling * b.B @ b.A, rtol=1e-6, atol=1e-6)


def test_the_command_line_says_it_in_json_and_explains_the_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, {Q: dora()})
    assert main(["inspect", str(tmp_path), "--for", "vllm", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["fates"]) == ("vllm", {Q: "refused"})
    assert main(["explain", "vllm"]) == 0
    assert "vllm#10849" in capsys.readouterr().out
    assert main(["convert", str(tmp_path), str(tmp_path / "x"), "--for", "vllm", "--to", "mlx"]) == 2
    assert not (tmp_path / "x").exists()


def test_every_rule_says_where_and_when_it_was_read_and_the_format_exists() -> None:
    from d2surgery.formats import FORMATS

    for engine in ENGINES.values():
        assert engine.source
        assert {engine.takes, *engine.formats} <= {format.NAME for format in FORMATS}
