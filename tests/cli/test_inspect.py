"""`inspect`, `explain` and what all verbs share: exit codes, JSON, errors as text, no heavy import."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from conftest import LORA, PAIR, WriteAdapter, safetensors_bytes
from safetensors.torch import save_file

from d2surgery.cli import main, output
from d2surgery.codes import CODES

A, B = PAIR
HEAVY = ("torch", "transformers", "numpy", "plotly", "peft", "scipy", "safetensors", "huggingface_hub", "tqdm")


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "import sys; from d2surgery.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Standard output is one JSON document without NaN, and nothing else."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    loaded: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    return loaded


# Weight ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["inspect", "{}"], ["inspect", "{}", "--json"], ["--help"], ["explain", "USAGE"]]
)
def test_a_look_at_the_header_imports_nothing_heavy(adapter: WriteAdapter, arguments: list[str]) -> None:
    code = (
        "import sys; from d2surgery.cli import main; code = main(sys.argv[1:]);"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *(text.format(adapter()) for text in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_450_modules_take_a_moment_and_little_memory(adapter: WriteAdapter) -> None:
    shapes = {A.replace("layers.0", f"layers.{i}"): (2, 6) for i in range(450)}
    shapes |= {B.replace("layers.0", f"layers.{i}"): (4, 2) for i in range(450)}
    code = (
        "import sys, time; from d2surgery.cli import main; main(sys.argv[1:]);"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"  # ru_maxrss would be our own, too
        "print(time.process_time(), peak, file=sys.stderr)"  # on a busy machine wall time is not ours
    )
    command = [sys.executable, "-c", code, "inspect", str(adapter(shapes))]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": own}
    runs = [subprocess.run(command, **options).stderr.split() for _ in range(5)]
    assert min(float(seconds) for seconds, _ in runs) < 0.25
    assert max(int(kilobytes) for _, kilobytes in runs) < 35 * 1024


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_json_has_the_documented_fields(adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = PAIR | {"base_model.model.score.weight": (2, 4), f"{A[:-14]}.lora_diag": (2,)}
    assert main(["inspect", str(adapter(shapes)), "--json"]) == 1
    found = document(capsys)
    assert found["schema_version"] == 1
    assert found["path"].endswith("adapter_model.safetensors")
    assert (found["format"], found["kinds"], found["base_model"]) == ("peft", ["lora"], "org/base")
    assert (found["tensors_total"], found["tensors_accounted"]) == (4, 3)
    (module,) = found["modules"]
    expected = {
        "module": "layers.0.q", "kind": "lora", "rank": 2, "ranks": {"update": 2}, "scaling": 2.0, "along": None,
        "out_features": 4, "in_features": 6, "dtype": "F32", "slots": {"A": A, "B": B},
    }  # fmt: skip
    assert {name: module[name] for name in expected} == expected
    (replaced,) = found["replacements"]
    assert (replaced["tensor"], replaced["shape"]) == ("score.weight", [2, 4])
    assert {(p["code"], p["severity"]) for p in found["problems"]} == {
        ("UNKNOWN_TENSOR", "error"),
        ("UNDECLARED_REPLACEMENT", "info"),
    }
    assert all(p["message"] and p["module"] and p["remedy"] for p in found["problems"])


def test_the_text_gives_verdict_reasons_summary_and_coverage_in_this_order(
    adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {
        key.replace("layers.0", f"layers.{i}").replace(".q.", f".{p}."): shape
        for i in range(3)
        for p in "qk"
        for key, shape in PAIR.items()
    }
    shapes |= {
        "base_model.model.score.weight": (2, 4),
        "base_model.model.e.token_adapter.trainable_tokens_delta": (2, 4),
    }
    config = {**LORA, "target_modules": ["q", "k"], "trainable_token_indices": [5, 7], "peft_version": "0.21.2"}
    assert main(["inspect", str(adapter(shapes, config))]) == 0
    text = capsys.readouterr().out
    parts = [
        "OK  LoRA on 6 modules: 1 note",
        "format  peft 0.21.2",
        "base    org/base",
        "info UNDECLARED_REPLACEMENT score.weight",
        "q ×3  rank 2  scaling 2.0  (6 → 4)  F32",
        "k ×3  rank 2  scaling 2.0  (6 → 4)  F32",
        "score.weight  2 × 4   F32",
        "e.weight      2 rows  F32",
        "14 tensors: 12 in 6 adapters, 1 replacement, token rows in 1, 0 unaccounted",
        "NaN would not show",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places, text
    assert places == sorted(places)


def test_per_layer_names_every_module_and_the_summary_gives_ranges(
    adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = PAIR | {A.replace("0", "1"): (8, 6), B.replace("0", "1"): (4, 8)}
    directory = str(adapter(shapes, {**LORA, "rank_pattern": {"layers.1.q": 8}}))
    assert main(["inspect", directory]) == 0
    assert "q ×2  rank 2–8  scaling 0.5–2.0" in capsys.readouterr().out
    assert main(["inspect", directory, "--per-layer"]) == 0
    text = capsys.readouterr().out
    assert "layers.0.q  rank 2  scaling 2.0" in text
    assert "layers.1.q  rank 8  scaling 0.5" in text


@pytest.mark.parametrize("columns", ["60", "120"])
def test_the_summary_fits_the_terminal(adapter: WriteAdapter, columns: str) -> None:
    name = "a_rather_long_projection_name_of_a_module"
    shapes = {key.replace(".q.", f".{name}."): shape for key, shape in PAIR.items()}
    done = run("inspect", str(adapter(shapes, {**LORA, "target_modules": [name]})), COLUMNS=columns)
    summary = [line for line in done.stdout.splitlines() if name in line or "rank" in line]
    assert summary
    assert max(map(len, summary)) <= int(columns)


def test_many_modules_with_one_fault_are_one_line_of_text_but_each_in_json(
    adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(adapter({A.replace("0", str(i)): (2, 6) for i in range(30)}))
    assert main(["inspect", directory]) == 1
    text = capsys.readouterr().out
    assert text.count("MISSING_HALF") == 1
    assert "layers.0.q and 29 more" in text
    assert main(["inspect", directory, "--json"]) == 1
    assert len(document(capsys)["problems"]) == 30


def test_names_from_a_file_cannot_move_the_cursor(adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter(PAIR | {"\x1b[2J\nx.weight": (2,)}))]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"\x1b[2J\nx.weight" in text


def test_quiet_prints_problems_only(adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter()), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["inspect", str(adapter({A: (2, 6)})), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("error MISSING_HALF layers.0.q: has A but no B\n  Get the complete")


# Exit codes -----------------------------------------------------------------------------------------------------------

FAIL_ON = [  # (config, --fail-on, exit code)
    (LORA, "info", 0),
    ({**LORA, "surprise": 1}, "error", 0),
    ({**LORA, "surprise": 1}, "warning", 1),
    ({**LORA, "surprise": 1}, "info", 1),
    ({**LORA, "surprise": 1}, "never", 0),
    ({**LORA, "r": 8}, "error", 1),
    ({**LORA, "r": 8}, "never", 0),
    (None, "error", 1),
]


@pytest.mark.parametrize(("config", "fail_on", "code"), FAIL_ON)
def test_the_exit_code_is_the_verdict(adapter: WriteAdapter, config: Any, fail_on: str, code: int) -> None:
    assert main(["inspect", str(adapter(PAIR, config)), "--fail-on", fail_on]) == code


UNREADABLE = [  # (bytes, code)
    (b"", "FILE_EMPTY"),
    (b"version https://git-lfs.github.com/spec/v1\n", "LFS_POINTER"),
    (b"\x10\x00\x00", "TRUNCATED_FILE"),
    (b"\xff" * 16, "CORRUPT_HEADER"),
]


@pytest.mark.parametrize(("data", "code"), UNREADABLE)
def test_an_unreadable_file_is_exit_2_with_where_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, code: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error {code} {path}: ")
    assert err.endswith(f"\n  {CODES[code].remedy}\n")
    assert main(["inspect", str(path), "--json"]) == 2
    found = document(capsys)
    assert (found["schema_version"], [p["code"] for p in found["problems"]]) == (1, [code])
    assert code in found["error"]


USAGE = [  # (arguments, part of the message)
    (["inspect"], "ADAPTER"),
    (["inspect", "x", "--fail-on", "maybe"], "maybe"),
    (["inspect", "x", "--nope"], "--nope"),
    (["inspekt", "x"], "inspekt"),
    (["explain", "NO_SUCH_CODE_AT_ALL"], "NO_SUCH_CODE_AT_ALL"),
    (["explain", "mising_half"], "MISSING_HALF"),
]


@pytest.mark.parametrize(("arguments", "part"), USAGE)
def test_wrong_usage_is_exit_2(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("error USAGE")) == ("", True)
    assert part in err
    assert main([*arguments, "--json"]) == 2
    assert document(capsys)["problems"][0]["code"] == "USAGE"


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/out"), 2, "error DISK_FULL /out: No space left"),
        (PermissionError(13, "Permission denied", "/in"), 2, "error FILE_UNREADABLE /in: Permission denied"),
    ],
)
def test_what_the_system_does_to_us_is_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: BaseException, code: int, text: str
) -> None:
    def broken(adapter: str, **options: Any) -> None:
        raise fault

    monkeypatch.setattr("d2surgery.cli.inspect.open_layout", broken)
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr().err.startswith(text)


class Panic(BaseException):
    """As a library written in Rust raises it."""


UNFORESEEN = [  # (what a library or a fault of ours raises, part of the message)
    (ValueError("one\ntwo"), "error UNFORESEEN: ValueError: one two"),
    (RecursionError("maximum recursion depth exceeded"), "error UNFORESEEN: RecursionError"),
    (KeyError("x"), "error UNFORESEEN: KeyError: 'x'"),
    (AssertionError(), "error UNFORESEEN: AssertionError"),
    (Panic("called unwrap"), "error UNFORESEEN: Panic: called unwrap"),
    (SystemExit(1), "error UNFORESEEN: SystemExit: 1"),
    (MemoryError(), "error OUT_OF_MEMORY: the system gave no more"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), "error OUT_OF_MEMORY: DefaultCPU"),
    (click.ClickException("no"), "error USAGE d2surgery: no"),
]


@pytest.mark.parametrize(("fault", "text"), UNFORESEEN)
@pytest.mark.parametrize("more", [[], ["--json"], ["--debug"]])
def test_what_nobody_foresaw_is_exit_2_and_no_traceback_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: BaseException, text: str, more: Any
) -> None:
    def broken(adapter: str, **options: Any) -> None:
        raise fault

    monkeypatch.setattr("d2surgery.cli.inspect.open_layout", broken)
    assert main(["inspect", "x", *more]) == 2
    said = capsys.readouterr()
    if more == ["--json"]:
        assert json.loads(said.out)["problems"][0]["code"] == text.split()[1].rstrip(":")
    else:
        assert text in said.err
        assert ("Traceback" in said.err) == (more == ["--debug"])


@pytest.mark.parametrize("stdout", ["/dev/full", "closed"])
def test_output_that_nobody_can_take_is_no_verdict(adapter: WriteAdapter, stdout: str) -> None:
    where = ">&-" if stdout == "closed" else f">{stdout}"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m d2surgery inspect "$1" {where}', sys.executable, str(adapter())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if stdout == "closed" else 2)
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback(adapter: WriteAdapter) -> None:
    shapes = {key.replace("0", str(i)): shape for i in range(3000) for key, shape in PAIR.items()}
    script = '"$0" -c "import sys; from d2surgery.cli import main; sys.exit(main())" inspect "$1" --per-layer | head -1'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(adapter(shapes))], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("OK  LoRA on 3000 modules")
    assert done.stderr == ""


def test_a_terminal_without_our_letters_gets_others(adapter: WriteAdapter) -> None:
    done = run("inspect", str(adapter()), PYTHONIOENCODING="iso8859-5")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"q \xd71  rank 2  scaling 2.0  (6 \u2192 4)" in done.stdout


# Values ---------------------------------------------------------------------------------------------------------------


def save(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = LORA) -> str:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    if config is not None:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


def known_update() -> dict[str, torch.Tensor]:
    """scaling 2 times B @ A = diag(6, 8) in the corner of a 4 × 6 matrix."""
    up, down = torch.zeros(4, 2), torch.zeros(2, 6)
    up[0, 0], up[1, 1], down[0, 0], down[1, 1] = 3.0, 2.0, 1.0, 2.0
    return {A: down, B: up}


def test_numbers_of_an_update_whose_spectrum_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", save(tmp_path, known_update()), "--numbers", "--json"]) == 0
    (module,) = document(capsys)["modules"]
    share = torch.tensor([8 / 14, 6 / 14], dtype=torch.float64)
    assert module["frobenius_norm"] == pytest.approx(10, rel=1e-12)
    assert module["spectral_norm"] == pytest.approx(8, rel=1e-12)
    assert module["stable_rank"] == pytest.approx(100 / 64, rel=1e-12)
    assert module["entropy_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-12)
    assert module["energy_rank_90"] == 2


def test_numbers_up_to_scale_give_ranks_and_no_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", save(tmp_path, known_update(), None), "--numbers", "--json"]) == 1
    (module,) = document(capsys)["modules"]
    assert (module["scaling"], module["frobenius_norm"], module["spectral_norm"]) == (None, None, None)
    assert module["stable_rank"] == pytest.approx(100 / 64, rel=1e-12)


def test_numbers_of_nothing_are_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in PAIR.items()}
    assert main(["inspect", save(tmp_path, tensors), "--numbers", "--json"]) == 0
    (module,) = document(capsys)["modules"]
    assert {module[name] for name in ("frobenius_norm", "spectral_norm", "entropy_rank", "stable_rank")} == {0.0}


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ((0, 1, 2), "3 of 3 modules are zero: merged, it is the base again"),
        ((1,), "1 of 3 modules are zero"),
        ((), None),
    ],
)
def test_modules_that_learnt_nothing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zero: tuple[int, ...], said: str | None
) -> None:
    tensors = {
        key.replace("layers.0", f"layers.{at}"): torch.zeros(shape) if at in zero and "_B" in key else torch.ones(shape)
        for at in range(3)
        for key, shape in PAIR.items()
    }
    directory = save(tmp_path, tensors)
    for arguments in (["inspect", directory, "--numbers"], ["spectrum", directory]):
        assert main([*arguments, "--json"]) == 0
        found = document(capsys)
        assert [p["message"] for p in found.get("problems", []) if p["code"] == "ZERO_UPDATE"] == (
            [said] if said and "problems" in found else []
        )
        assert found.get("zero_updates", [f"layers.{at}.q" for at in zero]) == [f"layers.{at}.q" for at in zero]
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert ("ZERO_UPDATE" in text, (said or "ZERO") in text) == (bool(zero), bool(zero))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_find_what_the_header_cannot_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, dtype: torch.dtype
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in known_update().items()} | {"score.weight": torch.ones(2, 2)}
    tensors[B][3, 1] = value
    directory = save(tmp_path, tensors)
    assert main(["inspect", directory]) == 0
    capsys.readouterr()
    assert main(["inspect", directory, "--numbers", "--json"]) == 1
    found = document(capsys)
    assert [(p["code"], p["module"]) for p in found["problems"] if p["severity"] == "error"] == [("NOT_FINITE", B)]
    assert found["modules"][0]["frobenius_norm"] is None


def test_plan_says_that_there_is_no_delta_and_prints_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(tmp_path / "a", {key: torch.zeros(shape) for key, shape in PAIR.items()})
    model = base(tmp_path / "base", {"layers.0.q.weight": (4, 6)})
    assert main(["plan", "--base", model, "--adapter", directory, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "nan" not in text.replace(str(tmp_path), "")
    assert "zero: there is nothing to lose" in text


@pytest.mark.parametrize("verb", ["plan", "merge", "audit", "report", "spectrum", "drift", "diff"])
def test_nothing_to_apply_is_refused_by_every_verb(
    adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    empty = str(adapter({}))
    assert main(["inspect", empty]) == 1
    model, out = base(tmp_path / "base", {"layers.0.q.weight": (4, 6)}), str(tmp_path / "out.html")
    arguments = {
        **{name: ["--base", model, "--adapter", empty, "--out", out] for name in ("plan", "merge")},
        "audit": ["--base", model, "--adapter", empty, "--merged", model],
        "report": [empty, "--out", out],
        "spectrum": [empty],
        "drift": [empty, "--base", model],
        "diff": [empty, empty],
    }[verb]
    capsys.readouterr()
    assert main([verb, *arguments]) == 2
    assert "error NOTHING_TO_APPLY" in capsys.readouterr().err
    assert not Path(out).exists()


# What people ask first ------------------------------------------------------------------------------------------------


def test_it_says_how_much_was_trained_with_which_alpha_and_for_what(
    adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = PAIR | {"base_model.model.score.weight": (3, 4)}
    more = {"lora_dropout": 0.05, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    directory = str(adapter(shapes, LORA | more))
    assert main(["inspect", directory]) == 0
    line = "  trained 20 parameters and 12 that replace the base's, alpha 4, dropout 0.05, for SEQ_CLS\n"
    assert line in capsys.readouterr().out
    assert main(["inspect", directory, "--json"]) == 0
    found = document(capsys)
    asked = {"parameters": 20, "replaced_parameters": 12, "alpha": 4, "dropout": 0.05, "task": "SEQ_CLS"}
    assert {name: found[name] for name in asked} == asked


def test_every_dtype_of_a_module_is_told(adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(adapter(PAIR, LORA, dtypes={A: "F16", B: "BF16"}))
    assert main(["inspect", directory]) == 0
    assert "F16 and BF16" in capsys.readouterr().out
    assert main(["inspect", directory, "--json"]) == 0
    (module,) = document(capsys)["modules"]
    assert (module["dtype"], module["dtypes"]) == ("F16", ["F16", "BF16"])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int) -> None:
    directory = Path(base(tmp_path / "model", {"model.layers.0.q.weight": (4, 6)}))
    if shards > 1:
        (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
        (directory / "model.safetensors.index.json").write_text("{}")
    assert main(["inspect", str(directory), "--json"]) == shards
    assert [p["code"] for p in document(capsys)["problems"]] == ["NOT_AN_ADAPTER"]


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (lambda p: torch.optim.AdamW([p]).state_dict(), "an optimizer's state"),
        (
            lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([p]), 1).state_dict(),
            "a learning-rate scheduler's",
        ),
    ],
)
def test_a_trainers_state_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: Any, what: str
) -> None:
    torch.save(state(torch.nn.Parameter(torch.ones(2))), tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error NOT_AN_ADAPTER")
    assert what in err


def test_a_config_and_an_npz_are_called_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA, indent=2))
    assert main(["inspect", str(tmp_path / "adapter_config.json")]) == 2
    assert "error NOT_AN_ADAPTER" in capsys.readouterr().err
    with (tmp_path / "adapters.bin").open("wb") as file:
        np.savez(file, a=np.ones(2))
    assert main(["inspect", str(tmp_path / "adapters.bin")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error NOT_SAFETENSORS")
    assert "a NumPy archive (.npz)" in err


# A base ---------------------------------------------------------------------------------------------------------------


def base(directory: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(safetensors_bytes(shapes))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(directory)


def test_with_a_base_it_says_what_would_change(
    adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(adapter())
    fitting = base(tmp_path / "fits", {"layers.0.q.weight": (4, 6), "other.weight": (2, 2)})
    assert main(["inspect", directory, "--base", fitting]) == 0
    assert f"1 tensor of {fitting} would change." in capsys.readouterr().out
    assert main(["inspect", directory, "--base", fitting, "--json"]) == 0
    assert document(capsys)["base_tensors_touched"] == 1


def test_with_a_base_it_says_what_the_config_promises_and_the_file_lacks(
    adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"model.layers.{at}.{name}.weight": (4, 6) for at in range(2) for name in ("q", "k", "v")}
    elsewhere = {"model.layers.0.norm.weight": (4,), "vision.layers.0.q.weight": (4, 6), "lm_head.weight": (9, 6)}
    directory = base(tmp_path / "base", weights | elsewhere)
    shapes = {key.replace("model.layers", "model.model.layers"): shape for key, shape in PAIR.items()}
    for targets, absent in {
        ("q",): ["model.layers.1.q"],
        ("q", "k"): ["model.layers.0.k", "model.layers.1.q", "model.layers.1.k"],
        ("0.q", "norm"): [],
        ("0.q", "lm_head"): ["lm_head"],
        r".*\.0\.[qv]": ["model.layers.0.v"],
        "all-linear": ["model.layers.1.q"],
    }.items():
        listed = targets if isinstance(targets, str) else list(targets)
        assert (
            main(["inspect", str(adapter(shapes, LORA | {"target_modules": listed})), "--base", directory, "--json"])
            == 0
        )
        found = [p["module"] for p in document(capsys)["problems"] if p["code"] == "PROMISED_BUT_ABSENT"]
        assert found == ([", ".join(absent)] if absent else []), targets


@pytest.mark.parametrize(
    ("shapes", "code"),
    [({"layers.1.q.weight": (4, 6)}, "NO_SUCH_MODULE"), ({"layers.0.q.weight": (5, 6)}, "SHAPE_MISMATCH")],
)
def test_with_a_base_that_does_not_fit_it_fails(
    adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str], shapes: Any, code: str
) -> None:
    assert main(["inspect", str(adapter()), "--base", base(tmp_path / "base", shapes)]) == 1
    assert f"error {code} " in capsys.readouterr().out


def test_a_base_that_is_none_is_exit_2(
    adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter()), "--base", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error BAD_BASE")


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_file_reads_like_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
    tensors = known_update() | {"score.weight": torch.arange(12.0).reshape(3, 4).T}
    documents = []
    for name, write in (("st", save_file), ("bin", torch.save)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(LORA))
        if write is torch.save:
            torch.save(tensors, tmp_path / name / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
        else:
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, tmp_path / name / "adapter_model.safetensors")
        assert main(["inspect", str(tmp_path / name), "--numbers", "--json"]) == 0
        documents.append(document(capsys))
    by_name = [{module["module"]: module for module in found["modules"]} for found in documents]
    assert by_name[0] == by_name[1]
    assert documents[0]["replacements"] == documents[1]["replacements"]


class Harmful:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm",))


PICKLES = [  # (object, part of the message)
    (Harmful(), "mkdir"),
    ({"a": torch.ones(2), "b": 3}, "'b' is not a dense tensor"),
    ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is not a dense tensor"),
    ({1: torch.ones(2)}, "1 is not a dense tensor"),
    ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ([torch.ones(2)], "not a table"),
]


@pytest.mark.parametrize(("value", "part"), PICKLES)
def test_a_pickle_with_more_than_tensors_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: Any, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(value, "adapter_model.bin")
    assert main(["inspect", "adapter_model.bin"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error PICKLE adapter_model.bin: ")
    assert part in err
    assert not (tmp_path / "harm").exists()


def test_a_damaged_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(known_update(), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error PICKLE")


def test_a_bin_file_that_is_none_is_named_for_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert main(["inspect", str(path)]) == 2
    assert "LFS_POINTER" in capsys.readouterr().err
    save_file(known_update(), path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    assert main(["inspect", str(path)]) == 0


# Explain and help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["MISSING_HALF", "missing_half", "missing-half"])
def test_explain_knows_every_spelling(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", spelling]) == 0
    meaning, remedy = CODES["MISSING_HALF"]
    assert capsys.readouterr().out == f"MISSING_HALF: {meaning}\n  {remedy}\n"


def test_explain_lists_all_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    text = capsys.readouterr().out
    assert all(code in text for code in CODES)
    assert main(["explain", "--json"]) == 0
    assert {entry["code"] for entry in document(capsys)["codes"]} == set(CODES)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    from d2surgery.cli import VERBS

    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb.example in text and verb.summary.split(".")[0] in " ".join(text.split()) for verb in VERBS.values())
    assert main(["inspect", "--help"]) == 0
    assert VERBS["inspect"].example in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("d2surgery ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2.0"), (1 / 3, "0.3333"), (None, "?"), (16, "16.0"), (1e-9, "1e-09"), (12345.0, "1.234e+04")],
)
def test_numbers_are_short_and_look_like_numbers(value: float | None, text: str) -> None:
    assert output.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**41, "2.0 TiB")])
def test_bytes_for_people(value: int, text: str) -> None:
    assert output.size(value) == text


def test_nan_never_becomes_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        output.emit_json({"value": float("nan")})


# Real adapters --------------------------------------------------------------------------------------------------------

PUBLISHED: list[tuple[Any, ...]] = [  # (folder, format, base, modules, rank, scaling, replaced tensors, codes)
    *[(f"gemma270m-aowei{suffix}", "peft", "gemma3-270m-it", 72, 4, 4.0, set(), set()) for suffix in
      ("", "-stage1", "-seed123")],
    ("distilbert-imdb", "peft", "distilbert-base-uncased", 12, 8, 2.0,
     {f"{m}.{p}" for m in ("classifier", "pre_classifier") for p in ("weight", "bias")}, set()),
    ("gpt2-anirudh", "peft", "gpt2", 12, 8, 1.0, {"score.weight"}, set()),
    ("sd-vfph55", "diffusers", None, 128, 4, 1.0, set(), set()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "base", "modules", "rank", "scaling", "replaced", "codes"), PUBLISHED)
def test_published_adapters_are_described_truthfully(
    published: Path, capsys: pytest.CaptureFixture[str], name: str, form: str, base: str | None, modules: int,
    rank: int, scaling: float | None, replaced: set[str], codes: set[str],
) -> None:  # fmt: skip
    with warnings.catch_warnings(action="error"):
        assert main(["inspect", str(published / name), "--json"]) == 0
    found = document(capsys)
    assert (found["format"], found["base_model"]) == (form, base)
    assert [(m["rank"], m["scaling"]) for m in found["modules"]] == [(rank, scaling)] * modules
    assert {r["tensor"] for r in found["replacements"]} == replaced
    assert {problem["code"] for problem in found["problems"]} == codes
    assert found["tensors_total"] == found["tensors_accounted"]


def test_what_peft_names_by_an_end_of_a_name_or_by_the_task_is_not_called_undeclared(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`classifier` names pre_classifier too; SEQ_CLS adds `score`."""
    for name in ("distilbert-imdb", "gpt2-anirudh"):
        assert main(["inspect", str(published / name)]) == 0
        text = capsys.readouterr().out
        assert text.startswith("OK")
        assert "for SEQ_CLS" in text


def test_a_published_lfs_pointer_is_explained(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(published / "lfs-pointer")]) == 2
    err = capsys.readouterr().err
    assert "error LFS_POINTER" in err
    assert "git lfs pull" in err
