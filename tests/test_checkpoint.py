"""Checkpoints: what is written reads back to the bit, for every kind and every place a tensor may have."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from models import Built, f64
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from d2surgery.adapters import KINDS, Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.checkpoint import Checkpoint, from_adapters, load, save
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights
from d2surgery.formats.layout import About


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make(kind: str, rank: int = 2, scaling: float = 0.7, dtype: torch.dtype = torch.float32, **options: Any) -> Adapter:
    A, B, C, D = (
        t.to(dtype) for t in (numbers(rank, 5), numbers(6, rank), numbers(rank, 5, seed=1), numbers(6, rank, seed=1))
    )
    if kind == "lora":
        return LoRA(A=A, B=B, scaling=scaling)
    if kind == "dora":
        return DoRA(A=A, B=B, magnitude=numbers(6), scaling=scaling, **options)
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C[:1], D=D[:, :1], scaling=scaling, **options)
    return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D, scaling=scaling, **options)


def assert_same(got: Adapter, want: Adapter) -> None:
    assert type(got) is type(want)
    assert got.scaling == want.scaling
    assert got.along == want.along
    if isinstance(got, D2LoRA) and isinstance(want, D2LoRA):
        assert (got.tau, got.form) == (want.tau, want.form)
    for name, slot in want.slots().items():
        assert got.slots()[name].dtype == slot.dtype
        assert torch.equal(got.slots()[name], slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_read_back_to_the_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Ranks and scalings differ between modules, and no alpha gives these scalings exactly."""
    adapters = {
        "layers.0.q": make(kind, scaling=0.1, dtype=dtype),
        "layers.0.k": make(kind, rank=3, scaling=1 / 3, dtype=dtype),
        "layers.1.q": make(kind, rank=3, scaling=2 / 7 * 1e-5, dtype=dtype),
    }
    save(from_adapters(adapters, About(base_model="org/base")), tmp_path / "a")
    back = load(tmp_path / "a")
    assert back.layout.problems == ()
    assert back.layout.base_model == "org/base"
    assert set(back) == set(adapters)
    for module, adapter in adapters.items():
        assert_same(back[module], adapter)


@pytest.mark.parametrize("form", ["projected_plus_update", "projected", "update"])
@pytest.mark.parametrize("along", ["in_features", "out_features"])
def test_d2_keeps_its_form_axis_and_tau(tmp_path: Path, form: str, along: str) -> None:
    adapter = make("d2lora", form=form, along=along, tau=0.123456789)
    save(from_adapters({"q": adapter}), tmp_path / "a")
    assert_same(load(tmp_path / "a")["q"], adapter)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("d2lora", {"detach_norm": True, "detach_minus": True}), ("duallora", {"ste": "mask"}), ("duallora", {})],
)
def test_choices_of_training_stand_in_the_config_and_come_back(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    adapter = make(kind, **options)
    save(from_adapters({"q": adapter}), tmp_path / "a")
    back = load(tmp_path / "a")
    assert options.items() <= back.layout.about.training.items()
    for name in back.layout.about.training:
        assert getattr(back["q"], name) == getattr(adapter, name)


def test_a_choice_of_training_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)  # test_adapters' import hook would speak first
    save(from_adapters({"q": make("duallora")}), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"training": {"ste": "straight"}}))
    with pytest.raises(D2SurgeryError, match="BAD_CONFIG: No such ste"):
        load(tmp_path / "a")["q"]


def test_a_scaling_that_no_alpha_gives_survives_in_the_header(tmp_path: Path) -> None:
    scaling = next(s for s in (0.1 + i * 1e-3 for i in range(1000)) if s * 3 / 3 != s)
    save(from_adapters({"q": make("lora", rank=3, scaling=scaling)}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] != scaling
    assert load(tmp_path / "a")["q"].scaling == scaling
    assert load(tmp_path / "a" / "adapter_model.safetensors")["q"].scaling == scaling


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_alone_describes_itself(tmp_path: Path, kind: str) -> None:
    adapter = make(kind)
    save(from_adapters({"q": adapter}), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert_same(load(tmp_path / "a" / "adapter_model.safetensors")["q"], adapter)


PLACES = (
    "gpt2 mixed", "convnext dora", "bert lora_bias", "bert bias all", "tied tokens", "llama tokens of both", "mixtral",
    "mixtral down", "llama saved modules", "llama embeddings dora", "llama dora rslora",
)  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_file_of_pefts_reads_and_writes_back_to_the_bit(
    built: Callable[[str], Built], tmp_path: Path, name: str
) -> None:
    """Embeddings, convolutions, experts, biases, rows and saved modules; PEFT warns of ours no more than of its own."""
    case = built(name)
    first = load(case.adapter)
    save(first, tmp_path / "a")
    old = load_file(case.adapter / "adapter_model.safetensors")
    new = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == case.config
    again = load(tmp_path / "a")
    assert again.layout.adapters == first.layout.adapters
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    loaded, said = loading(case, tmp_path / "a")
    assert said == loading(case, case.adapter)[1]
    assert torch.equal(case.forward(loaded), case.unmerged)


@pytest.mark.parametrize("name", PLACES)
def test_the_same_checkpoint_made_of_its_parts_is_the_same_to_peft(
    built: Callable[[str], Built], tmp_path: Path, name: str
) -> None:
    """Nothing of the file's config is given: it is made anew from the adapters and what the file says of itself."""
    case = built(name)
    first = load(case.adapter)
    save(rebuilt(first), tmp_path / "a")
    again = load(tmp_path / "a")
    assert [p for p in again.layout.problems if p.severity != "info"] == []
    assert again.layout.adapters.keys() == first.layout.adapters.keys()
    for module, entry in first.layout.adapters.items():
        for expert in range(entry.experts):
            assert_same(again.adapter(module, expert), first.adapter(module, expert))
    loaded, _ = loading(case, tmp_path / "a")
    assert torch.equal(case.forward(loaded), case.unmerged)


def rebuilt(checkpoint: Checkpoint) -> Checkpoint:
    """Through `from_adapters`, from values alone."""
    layout = checkpoint.layout
    stored = {module: entry.stored for module, entry in layout.adapters.items()}
    adapters = {
        module: [checkpoint.adapter(module, expert) for expert in range(entry.experts)]
        if entry.stored == "experts" else checkpoint[module]
        for module, entry in layout.adapters.items()
    }  # fmt: skip
    return from_adapters(
        adapters,
        replace(layout.about, settings={}),
        embeddings=[module for module in stored if stored[module] == "embedding"],
        kernels={module: entry.kernel for module, entry in layout.adapters.items() if entry.kernel},
        biases={module: checkpoint.bias(module) for module, e in layout.adapters.items() if "bias" in e.slots},
        replacements={target: checkpoint.tensor(key) for target, key in layout.replacements.items()},
        rows={target: (rows.indices, checkpoint.tensor(rows.key)) for target, rows in layout.rows.items()},
    )


def loading(case: Built, adapter: Path) -> tuple[Any, list[str]]:
    """The model with the adapter by PEFT, and what PEFT and transformers warned of."""
    model = case.load(case.base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, adapter).eval()
    return loaded, [str(warning.message) for warning in said]


class Net(nn.Module):
    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.q = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.q.weight.data.copy_(W)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_what_we_make_without_a_warning_and_sees_the_same_delta(tmp_path: Path, kind: str) -> None:
    W, adapter = numbers(6, 5, seed=3), make(kind, scaling=0.5)
    save(from_adapters({"q": adapter}), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(Net(W), tmp_path / "a")
    theirs = model.merge_and_unload().q.weight
    assert torch.allclose(theirs, W + adapter.delta(W), atol=1e-6)


def test_one_expert_is_asked_for_by_number(built: Callable[[str], Built]) -> None:
    checkpoint = load(built("mixtral down").adapter)
    module = next(m for m in checkpoint if m.endswith("down_proj"))
    with pytest.raises(D2SurgeryError, match="4 experts"):
        checkpoint[module]
    A, B = (f64(checkpoint.tensor(checkpoint.layout.adapters[module].keys[slot])) for slot in "AB")
    for expert in range(4):
        adapter = checkpoint.adapter(module, expert)
        assert (f64(adapter.slots()["A"]) == A[3 * expert : 3 * expert + 3]).all()
        assert (f64(adapter.slots()["B"]) == B[:, expert::4]).all()


def test_the_same_adapter_is_the_same_file(tmp_path: Path) -> None:
    """safetensors alone would write two orders of metadata, by chance: 16 of one are a chance in 32,768."""
    adapter = LoRA.init(torch.zeros(3, 4), rank=1, scaling=1.0, generator=torch.Generator().manual_seed(0))
    for number in range(16):
        save(from_adapters({"ä.\x7f": adapter}, About(base_model='a"ü\n\u2028')), tmp_path / str(number))
    assert len({file.read_bytes() for file in tmp_path.rglob("*.safetensors")}) == 1
    (found,) = load(tmp_path / "0").values()
    assert torch.equal(found.slots()["A"], adapter.A)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save(from_adapters({"q": make("lora")}), tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(D2SurgeryError) as error:
        save(from_adapters({"q": make("dora")}), tmp_path / "a")
    assert [problem.code for problem in error.value.problems] == ["OUTPUT_EXISTS"]
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_links_that_were_laid_where_it_will_be_written_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.partial", "adapter_model.safetensors"):
        (tmp_path / "a" / name).symlink_to("../precious" if name.endswith("l") or "config" in name else "../nothing")
    save(from_adapters({"q": make("lora")}), tmp_path / "a")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert load(tmp_path / "a").keys() == {"q"}
    assert not (tmp_path / "a" / "adapter_config.json").is_symlink()
    assert not (tmp_path / "a" / "adapter_model.safetensors").is_symlink()


COLUMNS = DoRA(A=numbers(2, 5), B=numbers(6, 2), magnitude=numbers(5), scaling=1.0, along="in_features")
REFUSED: list[tuple[Mapping[str, Adapter], str]] = [
    ({"q": make("lora"), "k": make("dora")}, "dora on k, lora on q"),
    ({"q": make("dora", along="out_features"), "k": COLUMNS}, "one along"),
    ({"q": make("d2lora", tau=0.1), "k": make("d2lora", tau=0.2)}, "one tau"),
    ({"q": make("d2lora", form="update"), "k": make("d2lora")}, "one form"),
    ({"q": make("duallora", ste="mask"), "k": make("duallora")}, "one ste"),
]


def test_a_dora_with_a_magnitude_per_input_is_a_form_of_ours_that_peft_refuses(tmp_path: Path) -> None:
    import peft

    save(from_adapters({"k": COLUMNS}), tmp_path / "a")
    again = load(tmp_path / "a")
    assert not again.layout.problems
    assert_same(again["k"], COLUMNS)
    with pytest.raises(KeyError, match="DORA"):
        peft.PeftConfig.from_pretrained(str(tmp_path / "a"))


@pytest.mark.parametrize(("adapters", "part"), REFUSED)
def test_what_one_file_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, adapters: Mapping[str, Adapter], part: str
) -> None:
    checkpoint = from_adapters(adapters)
    for module, adapter in adapters.items():
        assert_same(checkpoint[module], adapter)
    with pytest.raises(D2SurgeryError, match=part) as error:
        save(checkpoint, tmp_path / "a")
    assert {problem.code for problem in error.value.problems} == {"FORMAT_CANNOT_HOLD"}
    assert not (tmp_path / "a").exists()


def test_nothing_is_no_checkpoint() -> None:
    with pytest.raises(D2SurgeryError, match="no adapters"):
        from_adapters({})


def test_without_a_scaling_there_is_no_adapter(built: Callable[[str], Built], tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes((built("llama").adapter / "adapter_model.safetensors").read_bytes())
    checkpoint = load(file)
    with pytest.raises(D2SurgeryError) as error:
        checkpoint[next(iter(checkpoint))]
    assert [problem.code for problem in error.value.problems] == ["SCALING_UNKNOWN"]


def test_a_checkpoint_and_a_base_are_mappings(built: Callable[[str], Built]) -> None:
    case = built("llama")
    checkpoint, base = load(case.adapter), BaseWeights(case.base)
    assert isinstance(checkpoint, Checkpoint)
    assert len(checkpoint) == len(list(checkpoint)) == 14
    stored = load_file(case.base / "model.safetensors")
    assert base.keys() == stored.keys()
    assert len(base) == len(stored)
    assert all(torch.equal(base[name], stored[name]) for name in base)
    assert base.config["model_type"] == "llama"


def test_asking_whether_a_name_is_there_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(from_adapters({"a": LoRA(A=torch.ones(2, 4), B=torch.ones(6, 2), scaling=0.5)}), tmp_path / "adapter")
    checkpoint = load(tmp_path / "adapter")

    def reading(*_: object) -> None:
        raise AssertionError("it reads")

    monkeypatch.setattr(Checkpoint, "adapter", reading)
    monkeypatch.setattr("difflib.get_close_matches", reading)
    assert ("a" in checkpoint, "b" in checkpoint) == (True, False)
