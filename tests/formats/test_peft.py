"""PEFT's form by names and shapes: every problem by table, every spelling of a key, and nothing lost."""

import ast
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import LORA, PAIR, Shapes, WriteAdapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftType

from d2surgery.checkpoint import Checkpoint
from d2surgery.codes import CODES
from d2surgery.formats import open_layout, peft
from d2surgery.formats.layout import AdapterLayout, Layout, Slot
from d2surgery.formats.peft.config import Patterns
from d2surgery.formats.peft.writer import tensors_of

A, B = PAIR
Q = "base_model.model.layers.0.q"
DORA = {**LORA, "use_dora": True}
DUAL = {"peft_type": "DUALLORA", "r1": 2, "r2": 3, "lora_alpha": 6, "target_modules": ["q"]}
DUAL_SHAPES = {
    f"{Q}.lora_{slot}.weight": shape for slot, shape in {"A": (2, 6), "B": (4, 2), "C": (3, 6), "D": (4, 3)}.items()
}
D2 = {"peft_type": "D2LORA", "r": 2, "lora_alpha": 4, "tau": 0.25, "along": "in_features", "target_modules": ["q"]}
D2_SHAPES = {f"{Q}.lora_{s}_{b}.weight": PAIR[k] for b in ("plus", "minus") for s, k in (("A", A), ("B", B))}
EXPERTS = {
    **LORA,
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "peft_version": "0.21.2",
    "lora_B_layout": "rank_major",
}
E = "base_model.model.layers.0.experts"


def with_(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **changes}


def without(shapes: Shapes, *keys: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key not in keys}


def problems(layout: Layout) -> list[tuple[str, str]]:
    return [(problem.code, str(problem)) for problem in layout.problems]


def assert_conserved(layout: Layout) -> None:
    """Every key in exactly one place, and every unread key, or its module, named by a problem."""
    places = Counter([*layout.accounted(), *layout.unread])
    assert places == Counter(list(layout.header.tensors))
    unread = ("UNSUPPORTED_METHOD", "MERGED_LINEAR", "FOREIGN_FORMAT", "UNKNOWN_FORMAT", "NOT_AN_ADAPTER")
    whole = any(p.code in unread and not p.module for p in layout.problems)
    named = {problem.module for problem in layout.problems if problem.severity == "error"}
    for key in layout.unread:
        assert whole or key in named or any(name and name.rpartition(".")[0] in key for name in named), key


# One fault each -------------------------------------------------------------------------------------------------------

FAULTS: list[tuple[Shapes, dict[str, Any] | None, str, str]] = [  # (shapes, config, code, part of the message)
    (PAIR, None, "MISSING_CONFIG", "scaling is not"),
    (PAIR, {}, "MISSING_CONFIG", "scaling is not"),
    (without(PAIR, B), LORA, "MISSING_HALF", "has A but no B"),
    (without(PAIR, A), LORA, "MISSING_HALF", "has B but no A"),
    (without(DUAL_SHAPES, f"{Q}.lora_D.weight"), DUAL, "MISSING_HALF", "no D"),
    (without(D2_SHAPES, f"{Q}.lora_A_minus.weight"), D2, "MISSING_HALF", "no A_minus"),
    (PAIR, with_(LORA, lora_bias=True), "MISSING_HALF", "no lora_B.bias"),
    (PAIR, DORA, "MISSING_MAGNITUDE", "layers.0.q"),
    (PAIR | {f"{Q}.lora_magnitude_vector": (4,)}, LORA, "BAD_CONFIG", "use_dora is not set"),
    (PAIR | {f"{Q}.lora_magnitude_vector": (5,)}, DORA, "SHAPE_UNEXPECTED", "wanted 4 numbers; got (5,)"),
    (PAIR | {f"{Q}.lora_B.bias": (5,)}, with_(LORA, lora_bias=True), "SHAPE_UNEXPECTED", "wanted 4 numbers"),
    (PAIR | {f"{Q}.lora_B.bias": (4,)}, LORA, "UNEXPECTED_BIAS", "lora_bias is not set"),
    (PAIR | {A: (3, 6)}, LORA, "RANK_MISMATCH", "do not multiply"),
    (PAIR | {A: (3, 6), B: (4, 3)}, LORA, "RANK_DISAGREES", "wanted [2]; got [3]"),
    (PAIR, with_(LORA, rank_pattern={"q": 8}), "RANK_DISAGREES", "wanted [8]; got [2]"),
    (DUAL_SHAPES, with_(DUAL, r2=2), "RANK_DISAGREES", "wanted [2, 2]; got [2, 3]"),
    (DUAL_SHAPES | {f"{Q}.lora_C.weight": (3, 7)}, DUAL, "SHAPE_UNEXPECTED", "differ"),
    (D2_SHAPES | {f"{Q}.lora_B_minus.weight": (5, 2)}, D2, "SHAPE_UNEXPECTED", "differ"),
    ({A: (2, 6, 3, 3), B: (4, 1, 1, 1)}, LORA, "GROUPED_CONV", "do not multiply"),
    ({A: (4, 6), B: (4, 2, 1)}, LORA, "MERGED_LINEAR", "A (4, 6) and B (4, 2, 1)"),
    ({A: (4, 6), B: (4, 2, 1)}, with_(LORA, enable_lora=[True, False, True]), "MERGED_LINEAR", "[True, False, True]"),
    (PAIR, with_(LORA, enable_lora=[True], merge_weights=False), "MERGED_LINEAR", "enable_lora"),
    (PAIR | {A: (3, 6), B: (4, 3)}, with_(LORA, rank_pattern={"q": 8}), "RANK_DISAGREES", "wanted [8]; got [3]"),
    (PAIR | {A: (6,)}, LORA, "SHAPE_UNEXPECTED", "A is not a matrix"),
    (PAIR | {B: ()}, LORA, "SHAPE_UNEXPECTED", "B is not a matrix"),
    (dict.fromkeys(PAIR, (0,)), LORA, "EMPTY_TENSOR", "no elements"),
    (PAIR | {f"{Q}.lora_A.other.weight": (2, 6)}, LORA, "TWO_ADAPTERS", "twice"),
    (
        {f"{Q}.lora_A.one.weight": (2, 6), f"{Q}.lora_B.one.weight": (4, 2), f"{Q}.lora_B.two.weight": (4, 2)},
        LORA,
        "TWO_ADAPTERS",
        "belongs to adapter two",
    ),
    (PAIR | {"score.weight": (2, 4), "base_model.model.score.weight": (2, 4)}, LORA, "TWO_ADAPTERS", "replaced twice"),
    (PAIR | {f"{Q}.lora_diag": (2,)}, LORA, "UNKNOWN_TENSOR", "no slot"),
    (PAIR | {f"{Q}.lora_E": (2, 1)}, LORA, "UNKNOWN_TENSOR", "no slot"),
    (PAIR | {f"{Q}.lora_C.weight": (2, 6)}, LORA, "UNKNOWN_TENSOR", "lora has no slot C"),
    (PAIR | {f"{Q}.lora_A.bias": (2,)}, LORA, "UNKNOWN_TENSOR", "no slot"),
    (PAIR | {"lora_A.weight": (2, 6)}, LORA, "UNKNOWN_TENSOR", "no slot"),
    (D2_SHAPES | PAIR, D2, "UNKNOWN_TENSOR", "d2lora has no slot A"),
    ({"layers.0.q.weight": (4, 6), "layers.0.norm.weight": (6,)}, LORA, "NOT_AN_ADAPTER", "not factors: 1 of"),
    (PAIR, with_(LORA, target_modules=["k"]), "NOT_TARGETED", "layers.0.q"),
    (PAIR, with_(LORA, target_modules=r".*\.k"), "NOT_TARGETED", "layers.0.q"),
    (PAIR, with_(LORA, target_modules=r"layers\.0"), "NOT_TARGETED", "layers.0.q"),
    (PAIR, with_(LORA, target_modules=["0.q"], exclude_modules=["q"]), "NOT_TARGETED", "layers.0.q"),
    (PAIR, with_(LORA, layers_to_transform=[1]), "NOT_TARGETED", "layers.0.q"),
    (PAIR | {"base_model.model.layers.0.q.bias": (4,)}, LORA, "UNEXPECTED_BIAS", "full bias"),
    (PAIR | {"base_model.model.e.token_adapter.trainable_tokens_delta": (2, 3)}, LORA, "TOKEN_INDICES", "2 different"),
    (
        PAIR | {"base_model.model.e.token_adapter.trainable_tokens_delta": (2, 3)},
        with_(LORA, trainable_token_indices=[1, 1, 2]),
        "TOKEN_INDICES",
        "2 different",
    ),
    (
        PAIR | {"base_model.model.e.token_adapter.trainable_tokens_delta": (2, 3)},
        with_(LORA, trainable_token_indices={"other": [1, 2]}),
        "TOKEN_INDICES",
        "2 different",
    ),
    (
        PAIR | {"base_model.model.e.token_adapter.trainable_tokens_delta": ()},
        with_(LORA, trainable_token_indices=[1]),
        "SHAPE_UNEXPECTED",
        "one row per token",
    ),
    ({f"{E}.lora_A.weight": (3, 6), f"{E}.lora_B.weight": (4, 3)}, EXPERTS, "RANK_DISAGREES", "k·2"),
    (
        {f"{E}.lora_A.weight": (8, 6), f"{E}.lora_B.weight": (4, 8)},
        with_(EXPERTS, peft_version="0.19.0"),
        "OLD_EXPERT_PACKING",
        "got 0.19.0",
    ),
    (
        {f"{E}.lora_A.weight": (8, 6), f"{E}.lora_B.weight": (4, 8)},
        {key: value for key, value in EXPERTS.items() if key != "peft_version"},
        "OLD_EXPERT_PACKING",
        "got None",
    ),
    (
        {f"{E}.lora_A.weight": (8, 6), f"{E}.lora_B.weight": (4, 8)},
        with_(EXPERTS, target_parameters=["experts.w1", "experts.w2"]),
        "AMBIGUOUS_PARAMETER",
        "tell",
    ),
    (
        {f"{E}.base_layer.base_layer.lora_A.weight": (8, 6), f"{E}.base_layer.base_layer.lora_B.weight": (4, 8)},
        EXPERTS,
        "AMBIGUOUS_PARAMETER",
        "nested deeper",
    ),
    (
        {f"{Q}.base_layer.q.lora_A.weight": (2, 6), f"{Q}.base_layer.q.lora_B.weight": (4, 2)},
        LORA,
        "UNSUPPORTED_VARIANT",
        "MultiheadAttention",
    ),
    ({k: (2, 6, 3) if "A" in k else (4, 2, 1) for k in D2_SHAPES}, D2, "UNSUPPORTED_VARIANT", "linear modules only"),
    (PAIR, with_(LORA, layer_replication=[[0, 4], [2, 5]]), "LAYER_REPLICATION", "[0, 4]"),
    *[(PAIR, with_(LORA, **{field: value}), "UNSUPPORTED_VARIANT", name) for field, value, name in [
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"a": 1}, "KaSA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("velora_config", {"a": 1}, "VeLoRA"),
        ("monteclora_config", {"a": 1}, "MonteCLoRA"),
    ]],
    *[(PAIR, with_(LORA, init_lora_weights=init), "MUTATED_BASE", init) for init in (
        "pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq"
    )],
    *[(PAIR, with_(LORA, **{field: value}), "BAD_CONFIG", field) for field, value in [
        ("r", 0), ("r", "8"), ("r", True), ("r", None), ("r", 8.0),
        ("lora_alpha", "16"), ("lora_alpha", None), ("lora_alpha", float("nan")), ("lora_alpha", 10**400),
        ("rank_pattern", ["q"]), ("rank_pattern", {"q": 0}), ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q": "x"}), ("alpha_pattern", {"q": float("inf")}), ("alpha_pattern", "q"),
        ("target_modules", 5), ("target_modules", [5]), ("target_modules", "("), ("exclude_modules", {}),
        ("modules_to_save", [5]), ("modules_to_save", "score"), ("target_parameters", [None]),
        ("layers_to_transform", "1"), ("layers_pattern", 5), ("layers_pattern", ["("]),
        ("trainable_token_indices", "1"), ("use_dora", "yes"), ("use_rslora", 1), ("lora_bias", "yes"),
        ("bias", "some"), ("bias", []), ("peft_type", []), ("peft_type", None),
    ]],
    *[(D2_SHAPES, with_(D2, **{field: value}), "BAD_CONFIG", field) for field, value in [
        ("tau", "x"), ("along", "rows"), ("along", []), ("form", "sum"),
    ]],
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "config", "code", "part"), FAULTS)
def test_a_fault_is_an_error_with_its_code_and_what_it_is_about(
    adapter: WriteAdapter, shapes: Shapes, config: dict[str, Any] | None, code: str, part: str
) -> None:
    layout = open_layout(adapter(shapes, config))
    errors = {problem.code for problem in layout.problems if problem.severity == "error"}
    assert errors == {code}
    assert any(part in text for found, text in problems(layout) if found == code)
    assert_conserved(layout)


def test_every_code_of_the_format_has_a_case_here() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(peft.__file__).parent.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    constants = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    elsewhere = {"DTYPE_UNEXPECTED", "RANK_DOUBTFUL", "CONFIG_DISAGREES", "UNSUPPORTED_METHOD", "FORMAT_CANNOT_HOLD"}
    assert constants & set(CODES) == {code for _, _, code, *_ in [*FAULTS, *MILD]} | elsewhere


MILD: list[tuple[Shapes, dict[str, Any], str, str, str]] = [  # (shapes, config, code, severity, part)
    (PAIR, with_(LORA, surprise=3), "UNKNOWN_CONFIG_FIELD", "warning", "surprise = 3"),
    (PAIR, with_(LORA, rank_pattern={"k": 8}), "PATTERN_UNMATCHED", "warning", "'k'"),
    (PAIR, with_(LORA, alpha_pattern={"q": 8, "0.q": 16}), "AMBIGUOUS_PATTERN", "warning", "gives 16, 8"),
    (PAIR | {"base_model.model.score.weight": (2, 4)}, LORA, "UNDECLARED_REPLACEMENT", "info", "score.weight"),
    (
        PAIR | {f"base_model.model.score.{part}weight": (2, 4) for part in ("", "original_module.")},
        with_(LORA, modules_to_save=["score"]),
        "SUPERSEDED",
        "info",
        "a copy beside score.weight",
    ),
    (
        PAIR | {f"base_model.model.score.{part}.weight": (2, 4) for part in ("modules_to_save.one", "original_module")},
        with_(LORA, modules_to_save=["score"]),
        "SUPERSEDED",
        "info",
        "a copy beside score.modules_to_save.one.weight",
    ),
    (
        PAIR
        | {
            f"base_model.model.cls.{part}out.weight": (2, 4)
            for part in ("modules_to_save.default.", "original_module.")
        },
        with_(LORA, modules_to_save=["cls"]),
        "SUPERSEDED",
        "info",
        "a copy beside cls.modules_to_save.default.out.weight",
    ),
    (
        PAIR | {"base_model.model.score.original_module.weight": (2, 4)},
        LORA,
        "SUPERSEDED",
        "info",
        "no trained weight",
    ),
    (PAIR, with_(LORA, modules_to_save=["head"]), "PROMISED_BUT_ABSENT", "warning", "modules_to_save: head"),
    (PAIR, with_(LORA, trainable_token_indices=[1]), "PROMISED_BUT_ABSENT", "warning", "trainable_token_indices"),
    (
        {"base_model.model.score.weight": (2, 4)},
        with_(LORA, modules_to_save=["score"]),
        "PROMISED_BUT_ABSENT",
        "warning",
        "target_modules: ['q']",
    ),
    (
        PAIR,
        with_(LORA, modules_to_save=["qa_outputs"], task_type="QUESTION_ANS"),
        "PROMISED_BUT_ABSENT",
        "warning",
        "qa_outputs",
    ),
    (
        {f"{E}.lora_A.weight": (8, 6), f"{E}.lora_B.weight": (4, 8)},
        {k: v for k, v in with_(EXPERTS, target_parameters=["experts.down_proj"]).items() if k != "lora_B_layout"},
        "EXPERT_LAYOUT_ASSUMED",
        "warning",
        "read interleaved",
    ),
    (PAIR, with_(LORA, bias="lora_only"), "BIAS_NOT_SAVED", "warning", "no bias"),
    (PAIR | {f"{Q}.bias": (4,)}, with_(LORA, bias="all"), "PEFT_IGNORES_BIAS", "warning", "q.bias"),
]


@pytest.mark.parametrize(("shapes", "config", "code", "severity", "part"), MILD)
def test_what_may_be_right_is_said_and_does_not_stop_a_merge(
    adapter: WriteAdapter, shapes: Shapes, config: dict[str, Any], code: str, severity: str, part: str
) -> None:
    layout = open_layout(adapter(shapes, config))
    assert [(problem.code, problem.severity) for problem in layout.problems] == [(code, severity)]
    assert part in str(layout.problems[0])
    assert not layout.unread
    assert_conserved(layout)


@pytest.mark.parametrize("config", [LORA, DORA, D2, with_(LORA, modules_to_save=["score"]), None])
def test_a_file_with_nothing_in_it_is_an_error(adapter: WriteAdapter, config: dict[str, Any] | None) -> None:
    errors = [problem.code for problem in open_layout(adapter({}, config)).problems if problem.severity == "error"]
    assert errors == ["NOTHING_TO_APPLY"]


def test_a_pair_without_a_fault_has_no_problem(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter())
    assert (layout.format, layout.base_model, problems(layout)) == ("peft", "org/base", [])
    assert layout.adapters["layers.0.q"] == AdapterLayout(
        module="layers.0.q",
        kind="lora",
        stored="linear",
        slots={"A": Slot(A), "B": Slot(B)},
        ranks={"update": 2},
        out_features=4,
        in_features=6,
        dtype="F32",
        scaling=2.0,
        misread={"alpha/√r instead of alpha/r": 4 / 2**0.5, "alpha": 4.0},
    )


def test_halves_of_two_adapters_do_not_make_a_whole(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter({f"{Q}.lora_A.one.weight": (2, 6), f"{Q}.lora_B.two.weight": (4, 2)}))
    assert {code for code, _ in problems(layout)} == {"TWO_ADAPTERS", "MISSING_HALF"}
    assert_conserved(layout)


def test_our_own_kinds_read_back(adapter: WriteAdapter) -> None:
    dual = open_layout(adapter(DUAL_SHAPES, DUAL)).adapters["layers.0.q"]
    assert (dual.kind, dual.rank, dict(dual.ranks)) == ("duallora", None, {"magnitude": 2, "direction": 3})
    assert dual.scaling == pytest.approx(6 / 6**0.5, rel=1e-15)
    d2 = open_layout(adapter(D2_SHAPES, D2)).adapters["layers.0.q"]
    assert (d2.kind, d2.rank, dict(d2.ranks), d2.scaling) == ("d2lora", 4, {"plus": 2, "minus": 2}, 2.0)
    assert d2.settings == {"tau": 0.25, "along": "in_features", "form": "projected_plus_update"}


PEFTS_OWN = {t.value for t in PeftType} - {"LORA", "D2LORA", "DUALLORA"}  # our plugin may have added its two


@pytest.mark.parametrize("kind", [*sorted(PEFTS_OWN), "BONE", "SOMETHING_NEW"])
def test_every_other_method_is_refused_by_name(adapter: WriteAdapter, kind: str) -> None:
    layout = open_layout(adapter(PAIR, with_(LORA, peft_type=kind)))
    assert problems(layout) == [("UNSUPPORTED_METHOD", problems(layout)[0][1])]
    assert kind in problems(layout)[0][1]
    assert (dict(layout.adapters), set(layout.unread)) == ({}, set(PAIR))


def test_every_field_of_peft_is_known(adapter: WriteAdapter) -> None:
    names = {field.name for field in fields(LoraConfig)}
    layout = open_layout(adapter(PAIR, {**dict.fromkeys(names - {"target_parameters"}), **LORA}))
    assert not {code for code, _ in problems(layout)} & {"UNKNOWN_CONFIG_FIELD", "UNSUPPORTED_VARIANT"}


def test_all_faults_are_listed_at_once(adapter: WriteAdapter) -> None:
    shapes = PAIR | {
        "base_model.model.layers.1.q.lora_A.weight": (2, 6),
        "base_model.model.layers.2.q.lora_B.weight": (4, 2),
    }
    layout = open_layout(adapter(shapes, with_(LORA, bias="some")))
    assert Counter(code for code, _ in problems(layout)) == {"MISSING_HALF": 2, "BAD_CONFIG": 1}
    assert list(layout.adapters) == ["layers.0.q"]


# Spellings ------------------------------------------------------------------------------------------------------------

DORA_SHAPES = PAIR | {f"{Q}.lora_magnitude_vector": (4,)}
SPELLINGS = {
    "as PEFT writes it": lambda key: key,
    "default": lambda key: key.replace(".weight", ".default.weight").replace("_vector", "_vector.default.weight"),
    "another adapter name": lambda key: key.replace(".weight", ".mine.weight").replace("_vector", "_vector.mine"),
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
    "without .weight": lambda key: key.removesuffix(".weight"),
    "with .weight": lambda key: key.removesuffix(".weight") + ".weight",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "compiled per layer": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "data parallel": lambda key: f"module.{key}",
    "fsdp": lambda key: key.replace("layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."),
    "fabric": lambda key: f"_forward_module.{key}",
    "value head": lambda key: f"pretrained_model.{key}",
    "lightning": lambda key: f"model.{key}",
    "any trainer": lambda key: f"policy.network.{key}",
    "peft in peft": lambda key: key.replace("base_model.model.", "base_model.model." * 2),
    "peft in a wrapper in peft": lambda key: key.replace(
        "base_model.model.", "base_model.model.module.base_model.model."
    ),
    "fabric without peft's prefix": lambda key: key.replace("base_model.model.", "_forward_module.module."),
    "data parallel and compiled": lambda key: f"module._orig_mod.{key}".replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_keys_gives_the_same_layout(adapter: WriteAdapter, spelling: Any) -> None:
    score = "base_model.model.score.weight"
    shapes = {spelling(key): shape for key, shape in DORA_SHAPES.items()} | {score: (2, 4)}
    layout = open_layout(adapter(shapes, with_(DORA, modules_to_save=["score"])))
    (found,) = layout.adapters.values()
    assert problems(layout) == []
    assert (found.module, found.kind, found.ranks, found.scaling) == ("layers.0.q", "dora", {"update": 2}, 2.0)
    assert found.keys == {slot: spelling(key) for slot, key in zip(("A", "B", "magnitude"), DORA_SHAPES, strict=True)}
    assert layout.replacements == {"score.weight": score}
    assert [key for key, _ in tensors_of(Checkpoint(layout))] == [*DORA_SHAPES, score]


def test_a_rank_that_disagrees_leaves_the_scaling_open_and_its_pattern_alone(adapter: WriteAdapter) -> None:
    """The pattern matches: to call it unmatched would send its reader to the wrong line."""
    layout = open_layout(adapter(PAIR, with_(LORA, rank_pattern={"q": 8}, alpha_pattern={"q": 3})))
    assert [code for code, _ in problems(layout)] == ["RANK_DISAGREES"]
    assert (layout.adapters["layers.0.q"].rank, layout.adapters["layers.0.q"].scaling) == (2, None)


def test_patterns_are_not_judged_where_a_module_could_not_be_read(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter(PAIR | {A: (3, 6)}, with_(LORA, alpha_pattern={"q": 3})))
    assert [code for code, _ in problems(layout)] == ["RANK_MISMATCH"]


@pytest.mark.parametrize("target", ["classifier.weight", "pre_classifier.bias"])
def test_an_end_of_a_name_in_modules_to_save_declares_it(adapter: WriteAdapter, target: str) -> None:
    shapes = PAIR | {f"base_model.model.{target}": (4,)}
    layout = open_layout(adapter(shapes, with_(LORA, modules_to_save=["classifier"])))
    assert (list(layout.replacements), problems(layout)) == ([target], [])


@pytest.mark.parametrize("saved", [None, ["classifier", "score"]])
def test_a_head_that_pefts_task_adds_is_declared_and_the_name_it_has_not_is_no_promise(
    adapter: WriteAdapter, saved: list[str] | None
) -> None:
    shapes = PAIR | {"base_model.model.score.weight": (2, 4)}
    assert problems(open_layout(adapter(shapes, with_(LORA, modules_to_save=saved, task_type="SEQ_CLS")))) == []


def test_a_promise_is_not_missed_where_its_tensor_came_empty(adapter: WriteAdapter) -> None:
    shapes = PAIR | {"base_model.model.score.weight": (0,)}
    layout = open_layout(adapter(shapes, with_(LORA, modules_to_save=["score", "head"])))
    assert [code for code, _ in problems(layout)] == ["EMPTY_TENSOR"]


def test_a_rank_above_both_sides_is_doubted_where_no_config_confirms_it(adapter: WriteAdapter) -> None:
    shapes = {A: (48, 8), B: (8, 48)}
    assert [code for code, _ in problems(open_layout(adapter(shapes, None)))] == ["MISSING_CONFIG", "RANK_DOUBTFUL"]
    assert problems(open_layout(adapter(shapes, with_(LORA, r=48)))) == []


def test_alpha_and_dropout_are_told_as_the_config_has_them(adapter: WriteAdapter) -> None:
    about = open_layout(adapter(PAIR, with_(LORA, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM"))).about
    assert (about.alpha, about.dropout, about.task) == (32, 0.05, "CAUSAL_LM")


def test_the_trained_weight_wins_over_the_untrained_original(adapter: WriteAdapter) -> None:
    """As FSDP, DeepSpeed and plain `torch.save(model.state_dict())` leave them."""
    root = "base_model.model.head"
    shapes = PAIR | {f"{root}.original_module.weight": (2, 4), f"{root}.modules_to_save.default.weight": (2, 4)}
    layout = open_layout(adapter(shapes, with_(LORA, modules_to_save=["head"])))
    assert layout.replacements == {"head.weight": f"{root}.modules_to_save.default.weight"}
    assert layout.superseded == (f"{root}.original_module.weight",)


@pytest.mark.parametrize("infix", ["", ".modules_to_save.default", ".base_layer", ".token_adapter.base_layer"])
def test_a_replacement_lands_on_the_same_tensor_however_it_is_wrapped(adapter: WriteAdapter, infix: str) -> None:
    key = f"base_model.model.embed{infix}.weight"
    layout = open_layout(adapter(PAIR | {key: (9, 4)}, with_(LORA, modules_to_save=["embed"])))
    assert (layout.replacements, problems(layout)) == ({"embed.weight": key}, [])


def test_an_integer_buffer_of_a_saved_module_is_a_replacement_and_elsewhere_a_riddle(adapter: WriteAdapter) -> None:
    key = "base_model.model.norm.num_batches_tracked"
    saved = open_layout(adapter(PAIR | {key: ()}, with_(LORA, modules_to_save=["norm"]), dtypes={key: "I64"}))
    assert (saved.replacements, problems(saved)) == ({"norm.num_batches_tracked": key}, [])
    stray = open_layout(adapter(PAIR | {key: ()}, LORA, dtypes={key: "I64"}))
    assert [code for code, _ in problems(stray)] == ["UNKNOWN_TENSOR"]


def test_factors_of_integers_are_refused(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter(PAIR, LORA, dtypes={A: "U8"}))
    assert [code for code, _ in problems(layout)] == ["DTYPE_UNEXPECTED"]


# Rank and alpha patterns ----------------------------------------------------------------------------------------------


@given(
    st.from_regex(r"([ab1_]{1,2}\.){0,3}[ab1_]{1,2}", fullmatch=True),
    st.lists(
        st.from_regex(r"[ab1_.]{1,6}|\(a\|b\)\.1|\.\*b|a\\\.b|b\$", fullmatch=True), unique=True, min_size=1, max_size=4
    ),
)
def test_patterns_match_as_pefts_own_lookup_does(module: str, patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    table = {pattern: number for number, pattern in enumerate(patterns)}
    assert Patterns(table).value(module, -1) == table.get(get_pattern_key(table, module), -1)


# Experts --------------------------------------------------------------------------------------------------------------


def test_nested_experts_are_told_apart_by_depth(adapter: WriteAdapter) -> None:
    shapes = {
        f"{E}.lora_A.weight": (8, 5),
        f"{E}.lora_B.weight": (6, 8),
        f"{E}.base_layer.lora_A.weight": (8, 6),
        f"{E}.base_layer.lora_B.weight": (10, 8),
    }
    layout = open_layout(adapter(shapes, EXPERTS))
    found = {a.module: (a.stored, a.experts, a.rank, a.out_features, a.in_features) for a in layout.adapters.values()}
    assert problems(layout) == []
    assert found == {
        "layers.0.experts.gate_up_proj": ("experts", 4, 2, 10, 6),
        "layers.0.experts.down_proj": ("experts", 4, 2, 6, 5),
    }


@pytest.mark.parametrize("target", ["experts.down_proj", "layers.0.experts.down_proj", "down_proj"])
def test_one_target_parameter_names_itself(adapter: WriteAdapter, target: str) -> None:
    shapes = PAIR | {f"{E}.lora_A.weight": (8, 5), f"{E}.lora_B.weight": (6, 8)}
    layout = open_layout(adapter(shapes, with_(EXPERTS, target_parameters=[target])))
    assert (sorted(layout.adapters), problems(layout)) == (["layers.0.experts.down_proj", "layers.0.q"], [])
    assert (layout.adapters["layers.0.q"].stored, layout.adapters["layers.0.experts.down_proj"].experts) == (
        "linear",
        4,
    )


# A config inside the file ---------------------------------------------------------------------------------------------


def inside(config: Any, **more: Any) -> dict[str, str]:
    return {"d2surgery": json.dumps({"config": config, **more})}


def test_a_lone_file_of_ours_describes_itself_to_the_last_bit(adapter: WriteAdapter) -> None:
    scaling = 2.0 + 2**-50
    layout = open_layout(adapter(PAIR, None, metadata=inside(LORA, scaling={"layers.0.q": scaling})))
    assert (layout.adapters["layers.0.q"].scaling, layout.base_model, problems(layout)) == (scaling, "org/base", [])


def test_where_both_configs_exist_the_file_beside_wins_and_says_so(adapter: WriteAdapter) -> None:
    metadata = inside(with_(LORA, lora_alpha=8), scaling={"layers.0.q": 4.0})
    layout = open_layout(adapter(PAIR, LORA, metadata=metadata))
    assert [code for code, _ in problems(layout)] == ["CONFIG_DISAGREES"]
    assert layout.adapters["layers.0.q"].scaling == 2.0


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{}", '{"config": []}', '{"config": {}, "scaling": []}', "[" * 100_000]
)
def test_damage_under_our_metadata_key_is_as_if_it_were_not_there(adapter: WriteAdapter, text: str) -> None:
    layout = open_layout(adapter(PAIR, LORA, metadata={"d2surgery": text}))
    assert (layout.adapters["layers.0.q"].scaling, problems(layout)) == (2.0, [])


def test_a_scaling_inside_that_is_no_number_is_not_used(adapter: WriteAdapter) -> None:
    metadata = inside(LORA, scaling={"layers.0.q": float("nan")})
    assert open_layout(adapter(PAIR, LORA, metadata=metadata)).adapters["layers.0.q"].scaling == 2.0


# Anything at all ------------------------------------------------------------------------------------------------------

MODULES = st.sampled_from(
    ["layers.0.q", "layers.1.q", "layers.0.experts", "layers.0.experts.base_layer", "embed", "score"]
)
LEAVES = st.sampled_from(
    [*(f"lora_{s}.weight" for s in ("A", "B", "C", "D", "A_plus", "B_plus", "A_minus", "B_minus")), "lora_A.one.weight",
     "lora_B.two.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight",
     "bias", "base_layer.bias", "token_adapter.trainable_tokens_delta", "lora_down.weight", "hada_w1_a", "lora_E", "x"]
)  # fmt: skip
KEYS = st.builds("{}{}.{}".format, st.sampled_from(["", "base_model.model.", "module."]), MODULES, LEAVES) | st.text(
    max_size=6
).filter(lambda key: key != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-1, 4)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "peft_type": st.sampled_from(["LORA", "DUALLORA", "D2LORA", "VERA"]),
    "target_modules": st.sampled_from([["q"], "all-linear", r".*\.q"]),
    "target_parameters": st.sampled_from(
        [["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"], ["x"]]
    ),
    "trainable_token_indices": st.sampled_from([[0], [0, 1], {"embed": [0, 1]}]),
    "modules_to_save": st.just(["score"]),
    "peft_version": st.just("0.21.2"),
}
NAMES = sorted({f.name for f in fields(LoraConfig)} | {"r1", "r2", "tau", "along", "form"})
CONFIGS = st.none() | st.fixed_dictionaries({}, optional={n: VALUES.get(n, JUNK) | JUNK for n in NAMES})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.dictionaries(KEYS, SHAPES, max_size=8), config=CONFIGS)
def test_no_tensor_of_any_file_is_lost(adapter: WriteAdapter, shapes: Shapes, config: dict[str, Any] | None) -> None:
    directory = adapter(shapes, config)
    if config is None:
        (directory / "adapter_config.json").unlink(missing_ok=True)
    assert_conserved(open_layout(directory))
