"""Files of other adapter formats are recognised by their keys; nothing of them is guessed."""

import pytest
from conftest import Shapes, WriteAdapter

from d2surgery.formats import open_layout

BARE = {"layers.0.q.lora_A": (6, 4), "layers.0.q.lora_B": (4, 8)}
RECOGNISED = [  # (format, leaf)
    ("lycoris (OFT)", "oft_blocks"),
    ("PEFT VeRA without its config", "vera_lambda_b"),
    ("PEFT OFT without its config", "oft_R"),
    ("PEFT BOFT without its config", "boft_R"),
    ("PEFT IA3 without its config", "ia3_l"),
    ("PEFT prompt tuning without its config", "prompt_embeddings"),
]


def test_pairs_give_module_rank_and_shape_but_no_scaling(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter(BARE, None))
    (found,) = layout.adapters.values()
    assert layout.format == "x A B"
    assert (found.module, found.rank, found.out_features, found.in_features) == ("layers.0.q", 4, 8, 6)
    assert found.scaling is None
    assert [problem.code for problem in layout.problems] == ["FOREIGN_FORMAT"]
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(BARE)


@pytest.mark.parametrize(("name", "leaf"), RECOGNISED)
def test_other_methods_are_named_and_not_taken_apart(adapter: WriteAdapter, name: str, leaf: str) -> None:
    layout = open_layout(adapter({f"layers.0.q.{leaf}": (4, 6), "layers.0.q.other": (2,)}, None))
    assert (layout.format, dict(layout.adapters)) == (name, {})
    assert [problem.code for problem in layout.problems] == ["FOREIGN_FORMAT"]
    assert name in layout.problems[0].message
    assert set(layout.unread) == set(layout.header.tensors)


def test_a_file_of_no_adapters_is_unknown(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter({"emb_params.weight": (4, 4)}, None))
    assert (layout.format, [problem.code for problem in layout.problems]) == ("unknown", ["UNKNOWN_FORMAT"])
    assert layout.unread == ("emb_params.weight",)


@pytest.mark.parametrize(
    "key",
    ["model.layers.0.q.weight", "wte.weight", "bert.embeddings.word_embeddings.weight", "down_blocks.0.resnets.1.w",
     "lm_head.weight"],
)  # fmt: skip
def test_the_weights_of_a_model_are_called_that(adapter: WriteAdapter, key: str) -> None:
    (problem,) = open_layout(adapter({key: (4, 4)}, None)).problems
    assert (problem.code, problem.severity) == ("NOT_AN_ADAPTER", "error")
    assert "the weights of a model" in problem.message


def test_nothing_at_all_is_nothing_to_apply(adapter: WriteAdapter) -> None:
    assert [problem.code for problem in open_layout(adapter({}, None)).problems] == ["NOTHING_TO_APPLY"]


def test_a_pair_with_a_magnitude_is_dora(adapter: WriteAdapter) -> None:
    (found,) = open_layout(adapter(BARE | {"layers.0.q.magnitude": (8,)}, None)).adapters.values()
    assert (found.kind, found.settings["along"], found.rank) == ("dora", "out_features", 4)
    assert found.keys["magnitude"] == "layers.0.q.magnitude"


@pytest.mark.parametrize("leaf", ["lora_A", "lora_A.weight", "lora.lora_A", "lora_down.weight"])
def test_factors_that_lie_the_other_way_round_are_read_so(adapter: WriteAdapter, leaf: str) -> None:
    """(48, 8) and (8, 48) fit both ways; a rank of 48 in a weight of 8 × 8 is not what anyone trained."""
    up = leaf.replace("A", "B").replace("down", "up")
    sizes = {"q": (144, 8), "o": (48, 8)}
    shapes = {f"h.0.{m}.{leaf}": (48, 8) for m in sizes} | {f"h.0.{m}.{up}": s[::-1] for m, s in sizes.items()}
    found = open_layout(adapter(shapes, None)).adapters
    assert {m: (a.rank, a.in_features, a.out_features) for m, a in found.items()} == {
        f"h.0.{m}": (8, 48, size[0]) for m, size in sizes.items()
    }


@pytest.mark.parametrize(
    "shapes", [{"a.lora_down.weight": (4, 6)}, {"a.lora_down.weight": (4,), "a.lora_up.weight": ()}]
)
def test_halves_and_vectors_are_left_unread(adapter: WriteAdapter, shapes: Shapes) -> None:
    layout = open_layout(adapter(shapes, None))
    assert (dict(layout.adapters), set(layout.unread)) == ({}, set(shapes))
