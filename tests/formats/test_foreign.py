"""Files of other adapter formats are recognised by their keys; nothing of them is guessed."""

import pytest
from conftest import Shapes, WriteAdapter

from d2surgery.formats import open_layout

KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"
PAIRED = [  # (format, {key: shape}, module, rank, out_features, in_features)
    (
        "kohya",
        {f"{KOHYA}.lora_down.weight": (4, 6), f"{KOHYA}.lora_up.weight": (8, 4), f"{KOHYA}.alpha": ()},
        (KOHYA, 4, 8, 6),
    ),
    (
        "kohya",
        {f"{KOHYA}.lora_down.weight": (4, 6, 3, 3), f"{KOHYA}.lora_up.weight": (8, 4, 1, 1)},
        (KOHYA, 4, 8, 54),
    ),
    (
        "diffusers",
        {"unet.a.to_q.lora.down.weight": (4, 6), "unet.a.to_q.lora.up.weight": (8, 4)},
        ("unet.a.to_q", 4, 8, 6),
    ),
    (
        "diffusers",
        {"unet.a.to_q_lora.down.weight": (4, 6), "unet.a.to_q_lora.up.weight": (8, 4)},
        ("unet.a.to_q", 4, 8, 6),
    ),
    (
        "diffusers",
        {"te.q.lora_linear_layer.down.weight": (4, 6), "te.q.lora_linear_layer.up.weight": (8, 4)},
        ("te.q", 4, 8, 6),
    ),
    ("diffusers", {"unet.a.to_q.lora_A.weight": (4, 6), "unet.a.to_q.lora_B.weight": (8, 4)}, ("unet.a.to_q", 4, 8, 6)),
    (
        "diffusers",
        {"transformer.x.to_q.lora_A.weight": (4, 6), "transformer.x.to_q.lora_B.weight": (8, 4)},
        ("transformer.x.to_q", 4, 8, 6),
    ),
    ("torchtune", {"layers.0.q.lora_a.weight": (4, 6), "layers.0.q.lora_b.weight": (8, 4)}, ("layers.0.q", 4, 8, 6)),
    ("mlx", {"model.layers.0.q.lora_a": (6, 4), "model.layers.0.q.lora_b": (4, 8)}, ("model.layers.0.q", 4, 8, 6)),
]
RECOGNISED = [  # (format, leaf)
    ("lycoris (LoHa)", "hada_w1_a"),
    ("lycoris (LoKr)", "lokr_w1"),
    ("lycoris (LoKr)", "lokr_w1_a"),
    ("lycoris (OFT)", "oft_blocks"),
    ("PEFT VeRA without its config", "vera_lambda_b"),
    ("PEFT OFT without its config", "oft_R"),
    ("PEFT BOFT without its config", "boft_R"),
    ("PEFT IA3 without its config", "ia3_l"),
    ("PEFT prompt tuning without its config", "prompt_embeddings"),
]


@pytest.mark.parametrize(("name", "shapes", "expected"), PAIRED)
def test_pairs_give_module_rank_and_shape_but_no_scaling(
    adapter: WriteAdapter, name: str, shapes: Shapes, expected: tuple[str, int, int, int]
) -> None:
    layout = open_layout(adapter(shapes, None))
    (found,) = layout.adapters.values()
    assert layout.format == name
    assert (found.module, found.rank, found.out_features, found.in_features) == expected
    assert found.scaling is None
    assert [problem.code for problem in layout.problems] == ["FOREIGN_FORMAT"]
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(shapes)


@pytest.mark.parametrize(("name", "leaf"), RECOGNISED)
def test_other_methods_are_named_and_not_taken_apart(adapter: WriteAdapter, name: str, leaf: str) -> None:
    layout = open_layout(adapter({f"layers.0.q.{leaf}": (4, 6), "layers.0.q.other": (2,)}, None))
    assert (layout.format, dict(layout.adapters)) == (name, {})
    assert [problem.code for problem in layout.problems] == ["FOREIGN_FORMAT"]
    assert name in layout.problems[0].message
    assert set(layout.unread) == set(layout.header.tensors)


def test_mlx_config_beside_mlx_weights_does_not_make_them_pefts(adapter: WriteAdapter) -> None:
    shapes = {"model.layers.0.q.lora_a": (6, 4), "model.layers.0.q.lora_b": (4, 8)}
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}, "num_layers": 1}
    layout = open_layout(adapter(shapes, config))
    assert (layout.format, [problem.code for problem in layout.problems]) == ("mlx", ["FOREIGN_FORMAT"])


def test_a_file_of_no_adapters_is_unknown(adapter: WriteAdapter) -> None:
    layout = open_layout(adapter({"model.layers.0.q.weight": (4, 4)}, None))
    assert (layout.format, [problem.code for problem in layout.problems]) == ("unknown", ["UNKNOWN_FORMAT"])
    assert layout.unread == ("model.layers.0.q.weight",)


@pytest.mark.parametrize(
    "shapes", [{"a.lora_down.weight": (4, 6)}, {"a.lora_down.weight": (4,), "a.lora_up.weight": ()}]
)
def test_halves_and_vectors_are_left_unread(adapter: WriteAdapter, shapes: Shapes) -> None:
    layout = open_layout(adapter(shapes, None))
    assert (dict(layout.adapters), set(layout.unread)) == ({}, set(shapes))
