"""convert, resize, extract, combine and scale as a person runs them: every wish, every bad input, what is written."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from models import SIZES, byte_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from d2surgery import BaseWeights, D2LoRA, from_adapters, load, merge, save
from d2surgery.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and adapters of it by PEFT: lora, another, dora, whole (with a trained norm); d2lora by us."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    kinds: dict[str, dict[str, Any]] = {
        "lora": {}, "another": {}, "dora": {"use_dora": True}, "whole": {"modules_to_save": ["norm"]},
    }  # fmt: skip
    for seed, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        base = T.LlamaForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.05)
                if "magnitude" in key or "modules_to_save" in key:
                    parameter *= 1 + 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    weights, numbers = BaseWeights(folder / "base"), torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=numbers)

    save(from_adapters({
        module: D2LoRA(A_plus=normal(2, in_), B_plus=normal(out, 2, scale=0.01), A_minus=normal(2, in_),
                       B_minus=normal(out, 2, scale=0.01), scaling=1.0)
        for module in load(folder / "lora") for out, in_ in [weights[f"{module}.weight"].shape]
    }), folder / "d2lora")  # fmt: skip
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, out + err
    found: dict[str, Any] = json.loads(out)
    return found


def deltas(adapter: Path, base: Path) -> dict[str, Any]:
    weights = BaseWeights(base)
    return {m: a.delta(weights[f"{m}.weight"].double()).numpy() for m, a in load(adapter).items()}


def relative(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# Convert and resize ---------------------------------------------------------------------------------------------------


def test_a_dora_becomes_a_lora_with_its_error(world: Path, tmp_path: Path, capsys: Any) -> None:
    told = as_json(capsys, "convert", world / "dora", tmp_path / "a", "--kind", "lora", "--rank", 6,
                   "--base", world / "base", "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.html")  # fmt: skip
    wanted, got = (deltas(each, world / "base") for each in (world / "dora", tmp_path / "a"))
    for module in told["modules"]:
        assert module["relative_error"] == pytest.approx(
            relative(got[module["module"]], wanted[module["module"]]), rel=1e-5
        )
        assert module["rank"] == 6
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert {"relative_error", "spectral_error", "least_error"} == {row["metric"] for row in rows}
    assert "Error against rank" in (tmp_path / "a.html").read_text()
    code, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert code == 0
    of, on = (rf"{name}\.safetensors [0-9a-f]{{8}}" for name in ("adapter_model", "model"))
    assert re.search(rf"made +by convert of {of} on {on}, error", out)


def test_resize_by_every_wish(world: Path, tmp_path: Path, capsys: Any) -> None:
    wishes: dict[str, list[object]] = {
        "rank": ["--rank", 2], "energy": ["--energy", 0.8], "fro": ["--sv-fro", 0.9], "ratio": ["--sv-ratio", 2],
        "cumulative": ["--sv-cumulative", 0.6], "error": ["--max-error", 0.5],
        "kohya": ["--energy", 0.8, "--compat", "kohya"], "budget": ["--budget", "3KB"],
        "relative": ["--budget", "3KB", "--base", world / "base"],
        "above": ["--above-base", 0.05, "--base", world / "base"],
    }  # fmt: skip
    ranks = {}
    for name, words in wishes.items():
        told = as_json(capsys, "resize", world / "lora", tmp_path / name, *words)
        ranks[name] = [module["rank"] for module in told["modules"]]
        assert not load(tmp_path / name).layout.problems
        sizes = sum(tensor.numel() for tensor in load_file(tmp_path / name / "adapter_model.safetensors").values())
        assert "--budget" not in words or sizes * 4 <= 3000
    assert ranks["kohya"] == [rank + 1 for rank in ranks["energy"]]
    assert set(ranks["rank"]) == {2}
    doras = as_json(capsys, "resize", world / "dora", tmp_path / "dora", "--rank", 2, "--base", world / "base")
    assert doras["kinds"] == ["dora"]


def test_calibration_prints_both_errors(tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES | {"vocab_size": 300})).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    weights = BaseWeights(base)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    out, in_ = weights[name].shape
    adapters = {name.removesuffix(".weight"): load_lora(out, in_)}
    save(from_adapters(adapters), tmp_path / "lora")
    (tmp_path / "text").write_text("a b c d e f g\n" * 40)
    words = [tmp_path / "lora", "--base", base, "--rank", 3]
    plain = as_json(capsys, "resize", words[0], tmp_path / "plain", *words[1:])
    weighed = as_json(capsys, "resize", words[0], tmp_path / "weighed", *words[1:], "--calibration", tmp_path / "text")
    assert weighed["relative_error"] >= plain["relative_error"]
    assert weighed["weighted_error"] > 0
    model, tokenizer = T.AutoModelForCausalLM.from_pretrained(base), T.AutoTokenizer.from_pretrained(base)
    seen: list[Any] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda owner, given: seen.append(given[0].reshape(-1, in_).double().numpy()))
    ids = tokenizer((tmp_path / "text").read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    step = min(512, model.config.max_position_embeddings)
    with torch.no_grad():
        for start in range(0, len(ids), step):
            model(ids[None, start : start + step])
    x = np.concatenate(seen)
    moments = np.sqrt((x**2).mean(0))
    wanted = adapters[name.removesuffix(".weight")].update().dense().numpy()
    errors = {}
    for made in ("plain", "weighed"):
        got = load(tmp_path / made)[name.removesuffix(".weight")].update().dense().numpy()
        errors[made] = relative(got * moments, wanted * moments)
    assert errors["weighed"] < errors["plain"]
    assert weighed["modules"][0]["weighted_error"] == pytest.approx(errors["weighed"], rel=1e-4)
    code, said, _ = run(capsys, "resize", words[0], tmp_path / "c", *words[1:], "--calibration", tmp_path / "text")
    assert code == 0
    assert "of what it puts out on the text" in said


def load_lora(out: int, in_: int) -> Any:
    from d2surgery import LoRA

    numbers = torch.Generator().manual_seed(1)
    return LoRA(A=torch.randn(8, in_, generator=numbers), B=torch.randn(out, 8, generator=numbers), scaling=0.1)


def test_d2lora_goes_to_dora_and_back(world: Path, tmp_path: Path, capsys: Any) -> None:
    first = as_json(capsys, "convert", world / "d2lora", tmp_path / "dora", "--kind", "dora", "--base", world / "base")
    back = as_json(capsys, "convert", tmp_path / "dora", tmp_path / "back", "--kind", "d2lora", "--rank", 2,
                   "--base", world / "base")  # fmt: skip
    assert first["exact"]
    assert back["exact"]
    wanted, got = (deltas(each, world / "base") for each in (world / "d2lora", tmp_path / "back"))
    assert all(relative(got[module], wanted[module]) < 2e-5 for module in wanted)


# Extract --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "d2lora", "duallora"])
def test_extract_in_every_form_says_its_error(world: Path, tmp_path: Path, capsys: Any, kind: str) -> None:
    merge(world / "base", world / "dora", tmp_path / "tuned")
    told = as_json(capsys, "extract", "--base", world / "base", "--tuned", tmp_path / "tuned", "--kind", kind,
                   "--rank", 4, "--out", tmp_path / "out")  # fmt: skip
    assert told["kinds"] == [kind]
    wanted, got = (deltas(each, world / "base") for each in (world / "dora", tmp_path / "out"))
    errors = {module["module"]: module["relative_error"] for module in told["modules"]}
    assert errors == {
        module: pytest.approx(relative(got[module], wanted[module]), rel=1e-3, abs=1e-5) for module in wanted
    }
    assert (max(errors.values()) < 1e-4) == (kind == "dora")


# Combine and scale ----------------------------------------------------------------------------------------------------


def test_a_plan_writes_nothing_and_says_whether_it_makes_sense(world: Path, tmp_path: Path, capsys: Any) -> None:
    told = as_json(capsys, "combine", world / "lora", world / "another", "--plan", "--rank", 4)
    one, other = (deltas(world / name, world / "base") for name in ("lora", "another"))
    whole = {module: one[module] + other[module] for module in one}
    apart = sum(np.sum(each[module] ** 2) for each in (one, other) for module in each)
    assert told["energy"] == pytest.approx(sum(np.sum(each**2) for each in whole.values()) / apart, rel=1e-5)
    sigma = [np.linalg.svd(each, compute_uv=False) for each in whole.values()]
    least = np.sqrt(sum(np.sum(s[4:] ** 2) for s in sigma) / sum(np.sum(s**2) for s in sigma))
    assert told["error"] == pytest.approx(least, rel=1e-5)
    kept = sum(np.sum(whole[m] * one[m]) for m in one) / sum(np.sum(one[m] ** 2) for m in one)
    assert told["kept"][0] == pytest.approx(kept, rel=1e-5)
    code, out, _ = run(capsys, "combine", world / "lora", f"{world / 'lora'}:-0.9", "--plan")
    assert code == 0
    assert "they cancel" in out
    assert "much the same" in run(capsys, "combine", world / "lora", world / "lora", "--plan")[1]


def test_a_combination_is_audited_against_its_parts(world: Path, tmp_path: Path, capsys: Any) -> None:
    parts = [f"{world / 'lora'}:0.5", f"{world / 'another'}:-0.25"]
    methods = {"exact": "", "svd": "--rank 3", "ties": "--rank 4 --density 0.4", "dare": "--seed 3"}
    for method, words in methods.items():
        out = tmp_path / method
        assert run(capsys, "combine", *parts, "--method", method, *words.split(), "--out", out)[0] == 0
        assert as_json(capsys, "combine", world / "lora", world / "another", "--audit", out)["verdict"] == "pass"
    code, said, _ = run(capsys, "combine", world / "another", world / "lora", "--audit", tmp_path / "exact")
    assert code == 1
    assert "OTHER_PARTS" in said
    file = tmp_path / "exact" / "adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors[next(iter(tensors))] *= 1.01
    save_file(tensors, file, header)
    code, said, _ = run(capsys, "combine", world / "lora", world / "another", "--audit", tmp_path / "exact")
    assert code == 1
    assert "OTHER_COMBINATION" in said
    code, _, said = run(capsys, "combine", world / "lora", world / "another", "--audit", world / "lora")
    assert code == 2
    assert "no combination" in said


def test_a_combination_on_a_base_is_audited_on_that_base(world: Path, tmp_path: Path, capsys: Any) -> None:
    parts, base, other = (world / "lora", world / "dora"), world / "base", tmp_path / "base"
    whole = ("--method", "svd", "--rank", 16)
    assert run(capsys, "combine", *parts, "--base", base, *whole, "--out", tmp_path / "both")[0] == 0
    audit = ("combine", *parts, "--audit", tmp_path / "both", "--base")
    assert as_json(capsys, *audit, base)["verdict"] == "pass"
    shutil.copytree(base, other)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    code, said, _ = run(capsys, *audit, other)
    assert code == 1
    assert "OTHER_PARTS" in said


def test_a_part_of_a_d2lora_is_scaled_in_one_file(world: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["scale", world / "d2lora", 0.5, "--modules", "q_proj", "--base", world / "base", "--out", tmp_path / "a"]
    assert as_json(capsys, *words)["kinds"] == ["dora"]
    wanted, got = (deltas(each, world / "base") for each in (world / "d2lora", tmp_path / "a"))
    for module in wanted:
        factor = 0.5 if "q_proj" in module else 1.0
        assert relative(got[module], factor * wanted[module]) < 2e-5


def test_what_is_replaced_whole_is_scaled_too(world: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, said = run(capsys, "scale", world / "whole", -1, "--out", tmp_path / "a")
    assert code == 2
    assert "wanted a base" in said
    as_json(capsys, "scale", world / "whole", -1, "--base", world / "base", "--out", tmp_path / "b")
    merge(world / "base", tmp_path / "b", tmp_path / "merged")
    old, new = (load(path) for path in (world / "whole", tmp_path / "b"))
    key = "model.norm.weight"
    base = BaseWeights(world / "base")[key]
    wanted = 2 * base - old.tensor(old.layout.replacements[key])
    assert torch.allclose(new.tensor(new.layout.replacements[key]), wanted, atol=1e-6)
    as_json(capsys, "scale", world / "whole", 0, "--out", tmp_path / "zero")
    merge(world / "base", tmp_path / "zero", tmp_path / "same")
    first, second = (dict(BaseWeights(path)) for path in (world / "base", tmp_path / "same"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    part = as_json(capsys, "scale", world / "whole", 1, "--only", "--layers", "0", "--out", tmp_path / "part")
    assert [module["module"] for module in part["modules"]] == [m for m in load(world / "whole") if ".0." in m]
    assert all(".0." in target for target in load(tmp_path / "part").layout.replacements)


# Bad input ------------------------------------------------------------------------------------------------------------


def bad(world: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> words, and what the error says."""
    base, lora, dora, out = world / "base", world / "lora", world / "dora", tmp_path / "out"
    save(from_adapters({Q: load_lora(8, 8)}), tmp_path / "small")
    nan = load_lora(*BaseWeights(base)[f"{Q}.weight"].shape)
    nan.B[0, 0] = float("nan")
    save(from_adapters({Q: nan}), tmp_path / "nan")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    spoken, one = tmp_path / "spoken", ["resize", lora, out, "--rank", 1]
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES | {"vocab_size": 300})).save_pretrained(spoken)
    byte_tokenizer().save_pretrained(spoken)
    other = torch.full((32,), 2.0)
    save(from_adapters({Q: load_lora(8, 8)}, replacements={"model.norm.weight": other}), tmp_path / "norm2")
    save(from_adapters({Q: load_lora(8, 8)}, replacements={"model.norm.weight": other + 1}), tmp_path / "norm3")
    return {
        "no base": (["convert", dora, out, "--kind", "lora"], "wanted a base"),
        "no kind": (["convert", lora, out], "which kind"),
        "no wish": (["resize", lora, out], "how many ranks"),
        "two wishes": (["resize", lora, out, "--rank", 2, "--budget", "8KB"], "how many ranks"),
        "two criteria": (["resize", lora, out, "--energy", 0.5, "--sv-fro", 0.5], "one criterion"),
        "a share above 1": (["resize", lora, out, "--energy", 1.5], "0 to 1"),
        "another base": (["convert", tmp_path / "small", out, "--kind", "dora", "--base", base], "SHAPE_MISMATCH"),
        "other shapes": (["combine", lora, tmp_path / "small", "--out", out], "SHAPE_MISMATCH"),
        "not finite": (["resize", tmp_path / "nan", out, "--rank", 1], "NOT_FINITE"),
        "not finite in a sum": (["combine", tmp_path / "nan", lora, "--out", out], "NOT_FINITE"),
        "unchanged": (["extract", "--base", base, "--tuned", base, "--out", out], "nothing has changed"),
        "no budget": (["resize", lora, out, "--budget", "10B"], "BUDGET"),
        "an error that no rank meets": (["resize", lora, out, "--rank", 1, "--max-error", 0.01], "would do"),
        "two norms": (["combine", tmp_path / "norm2", tmp_path / "norm3", "--out", out], "REPLACEMENTS_DISAGREE"),
        "a weight that is no number": (["combine", f"{lora}:nan", "--out", out], "not a finite number"),
        "nowhere": (["combine", lora, lora], "where to"),
        "everywhere": (["combine", lora, lora, "--out", out, "--plan"], "where to"),
        "slerp of three": (["combine", lora, lora, lora, "--method", "slerp", "--out", out], "two adapters"),
        "full rank": (["combine", dora, lora, "--base", base, "--out", out], "full rank"),
        "tsv of a dora": (["combine", dora, lora, "--base", base, "--method", "tsv", "--out", out], "with factors"),
        "no words": ([*one, "--base", base, "--calibration", tmp_path / "none"], "tokenizer"),
        "no text": ([*one, "--base", spoken, "--calibration", tmp_path / "none"], "no such text"),
        "no letters": ([*one, "--base", spoken, "--calibration", tmp_path / "empty"], "empty"),
        "no UTF-8": ([*one, "--base", spoken, "--calibration", tmp_path / "binary"], "UTF-8"),
        "no base to run": ([*one, "--calibration", tmp_path / "empty"], "--base"),
        "a factor that is no number": (["scale", lora, "nan", "--out", out], "not a finite number"),
        "no such module": (["scale", lora, 2, "--modules", "nothing", "--out", out], "no module is chosen"),
        "a bad expression": (["scale", lora, 2, "--modules", "(", "--out", out], "regular expression"),
        "layers": (["scale", lora, 2, "--layers", "a-b", "--out", out], "--layers"),
        "there already": (["resize", lora, lora, "--rank", 1], "OUTPUT_EXISTS"),
        "a plot of no kind": (["resize", lora, out, "--rank", 1, "--plot", tmp_path / "a.txt"], "--plot"),
        "a budget of Dual LoRA": (["resize", tmp_path / "dual", out, "--budget", "8KB"], "singular values"),
    }  # fmt: skip


def test_bad_input_is_an_error_that_says_so(world: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, "convert", world / "lora", tmp_path / "dual", "--kind", "duallora")[0] == 0
    for name, (words, said) in bad(world, tmp_path).items():
        code, out, err = run(capsys, *words)
        assert code == 2, (name, out, err)
        assert said in err, (name, err)
        assert "Traceback" not in err, name
        assert not (tmp_path / "out").exists(), name
