"""Other formats on the command line: `convert --to`, `inspect`, `--scale` and `--alpha`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_llama
from safetensors.torch import load_file
from toy_llama import save_base, toy

import d2surgery
from d2surgery.cli import main


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def lone(tmp_path: Path, dora: bool = False) -> Path:
    """MLX-LM's weights without their config."""
    path = toy_llama.mlx(toy(dora), tmp_path / "lone")
    (path / "adapter_config.json").unlink()
    return path


def test_convert_says_by_module_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(toy_llama.mlx(toy(), tmp_path / "mlx"))
    assert main(["convert", adapter, str(tmp_path / "a"), "--to", "diffusers", "--json"]) == 0
    found = document(capsys)
    assert (found["format"], found["max_relative_difference"]) == ("diffusers", 0.0)
    assert {(m["rank"], m["scaling"], m["how"]) for m in found["modules"]} == {(4, 0.5, "the same bits")}
    assert main(["convert", adapter, str(tmp_path / "b"), "--to", "peft-serving"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("OK  LoRA on 3 modules as peft-serving, read back: the same deltas\n")
    assert "q_proj ×1     rank 4 → 8  scaling 0.5 → 1.0  padded and folded" in out
    assert main(["convert", adapter, str(tmp_path / "c"), "--to", "kohya", "--rank", "2", "--json"]) == 0
    assert {m["rank"] for m in document(capsys)["modules"]} == {2}
    assert d2surgery.load(tmp_path / "c").layout.format == "kohya"


def test_convert_refuses_what_the_format_cannot_hold_and_names_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(toy_llama.mlx(toy(dora=True), tmp_path / "mlx"))
    assert main(["convert", adapter, str(tmp_path / "out"), "--to", "peft-serving"]) == 2
    err = capsys.readouterr().err
    assert "error FORMAT_CANNOT_HOLD" in err
    assert "--kind lora --max-error" in err
    assert "merge" in err
    assert not (tmp_path / "out").exists()


def test_convert_looks_names_and_heads_up_in_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = toy()
    base = str(save_base(adapter, tmp_path / "base"))
    kohya, gguf = toy_llama.kohya(adapter, tmp_path / "kohya"), toy_llama.gguf(adapter, tmp_path / "gguf")
    for at, (path, code) in enumerate(((kohya, "AMBIGUOUS_NAME"), (gguf, "HEADS_UNKNOWN"))):
        out = str(tmp_path / f"out{at}")
        assert main(["convert", str(path), out, "--to", "peft"]) == 2
        assert f"error {code}" in capsys.readouterr().err
        assert main(["convert", str(path), out, "--to", "peft", "--base", base, "--json"]) == 0
        assert {m["module"] for m in document(capsys)["modules"]} == set(adapter.A)
        for verb in ("inspect", "drift", "spectrum"):
            assert main([verb, str(path), "--base", base, "--json"]) == 0
            assert {m["module"] for m in document(capsys)["modules"]} == set(adapter.A)


def test_convert_writes_over_no_adapter_of_any_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = toy_llama.mlx(toy(), tmp_path / "mlx")
    assert main(["convert", str(adapter), str(adapter), "--to", "gguf"]) == 2
    assert "error OUTPUT_EXISTS" in capsys.readouterr().err


def test_inspect_says_which_rule_told_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"kohya": "keys end in .lora_down.weight", "diffusers": "lora_adapter_metadata in the header",
             "mlx": "keys end in .lora_a and .lora_b", "gguf": "a GGUF file"}  # fmt: skip
    for name, rule in rules.items():
        path = str(toy_llama.LORA[name](toy(), tmp_path / name))
        main(["inspect", path, "--json"])
        found = document(capsys)
        assert (found["format"], found["format_rule"]) == (name, rule)
        main(["inspect", path])
        assert f"  format  {name}: {rule}\n" in capsys.readouterr().out


def test_a_scaling_that_the_file_does_not_carry_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = toy()
    path, base = str(lone(tmp_path)), str(save_base(adapter, tmp_path / "base"))
    merge = ["merge", "--base", base, "--adapter", path, "--out", str(tmp_path / "out"), "--quiet"]
    for verb in (["inspect", path], merge, ["convert", path, str(tmp_path / "c"), "--to", "peft"]):
        assert main(verb) in (1, 2)
        said = "".join(capsys.readouterr())
        assert "error SCALING_UNKNOWN" in said
        assert "--scale" in said
    assert main([*merge, "--alpha", "2"]) == 0
    assert main(["inspect", path, "--scale", "0.5", "--json"]) == 0
    assert {m["scaling"] for m in document(capsys)["modules"]} == {0.5}
    assert main(["convert", path, str(tmp_path / "c"), "--to", "peft", "--alpha", "2"]) == 0
    assert {entry.scaling for entry in d2surgery.open_layout(tmp_path / "c").adapters.values()} == {0.5}
    capsys.readouterr()
    for wrong in (["--scale", "1", "--alpha", "2"], ["--scale", "nan"]):
        assert main(["inspect", path, *wrong]) == 2
    assert main(["inspect", str(tmp_path / "c"), "--scale", "1"]) == 2
    assert "the file has its own scaling" in capsys.readouterr().err


def test_spectra_of_an_unknown_scaling_are_up_to_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(lone(tmp_path))
    assert main(["spectrum", path, "--json"]) == 0
    unscaled = document(capsys)
    assert main(["spectrum", path, "--json", "--scale", "2"]) == 0
    scaled = document(capsys)
    assert (unscaled["up_to_scale"], scaled["up_to_scale"]) == (True, False)
    for one, two in zip(unscaled["modules"], scaled["modules"], strict=True):
        assert two["frobenius_norm"] == pytest.approx(2 * one["frobenius_norm"])
        assert two["stable_rank"] == pytest.approx(one["stable_rank"])
    assert main(["spectrum", path]) == 0
    assert "warning SCALING_UNKNOWN" in capsys.readouterr().out
    (tmp_path / "dora").mkdir()
    assert main(["spectrum", str(lone(tmp_path / "dora", dora=True))]) == 2


def test_two_formats_in_one_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        **load_file(toy_llama.kohya(toy(), tmp_path / "k")),
        **load_file(toy_llama.mlx(toy(), tmp_path / "m") / "adapters.safetensors"),
    }
    toy_llama.save(tensors, tmp_path / "both.safetensors")
    assert main(["inspect", str(tmp_path / "both.safetensors"), "--json"]) == 1
    problems = {problem["code"]: problem["message"] for problem in document(capsys)["problems"]}
    assert (
        "the keys of kohya, and 6 of another: keys end in .lora_a and .lora_b, which is mlx"
        in problems["MIXED_FORMATS"]
    )


def test_no_format_needs_torch_or_numpy_to_be_described(tmp_path: Path) -> None:
    pickled = ("litgpt",)  # which torch reads
    paths = [str(write(toy(), tmp_path / name)) for name, write in toy_llama.LORA.items() if name not in pickled]
    lycoris = {f"lycoris_fc.hada_{leaf}": toy_llama.numbers(4, 4, seed=1) for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")}
    paths.append(str(toy_llama.save(lycoris, tmp_path / "loha.safetensors")))
    code = """
import sys
from d2surgery import open_layout
print(*(open_layout(path).format for path in sys.argv[1:]), *sorted({"torch", "numpy", "gguf"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kohya", "diffusers", "mlx", "mlx", "gguf", "adapterhub", "lycoris"]
