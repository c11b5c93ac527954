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


MAGNITUDES = [  # (pair and magnitude, shape of the magnitude, along)
    (("lora_down.weight", "lora_up.weight", "dora_scale"), (8, 1), "out_features"),
    (("lora_down.weight", "lora_up.weight", "dora_scale"), (1, 6), "in_features"),
    (("lora_A.weight", "lora_B.weight", "magnitude"), (8,), "out_features"),
    (("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), (8,), "out_features"),
    (("lora_a", "lora_b", "m"), (8,), "out_features"),
    (("lora_a.weight", "lora_b.weight", "magnitude"), (8,), "out_features"),
]


@pytest.mark.parametrize(("leaves", "shape", "along"), MAGNITUDES)
def test_a_pair_with_a_magnitude_is_dora(
    adapter: WriteAdapter, leaves: tuple[str, str, str], shape: tuple[int, ...], along: str
) -> None:
    down, up = ((6, 4), (4, 8)) if leaves[0] == "lora_a" else ((4, 6), (8, 4))
    shapes = {f"unet.x.{leaf}": size for leaf, size in zip(leaves, (down, up, shape), strict=True)}
    (found,) = open_layout(adapter(shapes, None)).adapters.values()
    assert (found.kind, found.settings["along"], found.rank) == ("dora", along, 4)
    assert found.keys == {"A": f"unet.x.{leaves[0]}", "B": f"unet.x.{leaves[1]}", "magnitude": f"unet.x.{leaves[2]}"}


def test_the_kernel_of_a_convolution_may_lie_in_a_third_factor(adapter: WriteAdapter) -> None:
    sizes = {"lora_down": (4, 16, 1, 1), "lora_mid": (4, 4, 3, 3), "lora_up": (8, 4, 1, 1)}
    layout = open_layout(adapter({f"{KOHYA}.{name}.weight": shape for name, shape in sizes.items()}, None))
    (found,) = layout.adapters.values()
    assert (found.stored, found.kernel, found.in_features, found.out_features, found.rank) == (
        "conv", (16, 3, 3), 144, 8, 4
    )  # fmt: skip
    assert layout.unread == ()


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
