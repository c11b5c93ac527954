"""Names: transformers' own renamings as data, and what a prefix may and may not do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import renamed
import torch
import transformers
from landing import Shapes, header, pair, place
from safetensors.torch import load_file

from d2surgery.errors import Problems
from d2surgery.files.checkpoints import read_checkpoint_header
from d2surgery.placement.names import Names
from d2surgery.placement.renaming import Renaming, table
from d2surgery.placement.ties import find_tie

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8}  # fmt: skip


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**CLIP).to_dict(),
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    text, vision = transformers.Gemma3TextConfig(**TEXT), transformers.SiglipVisionConfig(**CLIP)
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    return transformers.Gemma3ForConditionalGeneration(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=3))


def vit(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**CLIP)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinForImageClassification(config)


def segformer() -> Any:
    config = transformers.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2])
    return transformers.SegformerForSemanticSegmentation(config)


def detr() -> Any:
    backbone = transformers.ResNetConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, embedding_size=8, out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def nomic() -> Any:
    return transformers.AutoModelForMaskedLM.from_config(
        transformers.AutoConfig.for_model("nomic_bert", **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"})
    )


MODELS = {
    "llava": llava, "gemma3": gemma3, "mixtral": mixtral, "vit": lambda: vit("ViT"), "deit": lambda: vit("DeiT"),
    "beit": lambda: vit("Beit"), "dinov2": lambda: vit("Dinov2"), "swin": swin, "segformer": segformer, "detr": detr,
    "nomic": nomic,
}  # fmt: skip


def names(base: Mapping[str, Any], config: Mapping[str, Any]) -> Names:
    found = header({name: tuple(value.shape) for name, value in base.items()})
    return Names(found, config, find_tie(found, config), Problems())


# transformers' table --------------------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_installed_transformers() -> None:
    """Red after an upgrade that renames something: `python tests/renamed.py` writes the table anew."""
    rules, known = renamed.mappings(), table()["mappings"]
    used = {entry[2] for entries in table()["models"].values() for entry in entries} | {"legacy"}
    assert known.keys() == used
    for key, value in known.items():
        assert json.loads(json.dumps(rules[key])) == (known[value] if isinstance(value, str) else value), key


def test_what_applies_to_which_model_is_as_the_installed_transformers_says() -> None:
    if transformers.__version__ != table()["transformers"]:  # with the same version it was written by it
        found = renamed.table()
        assert {part: found[part] for part in ("models", "types")} == {
            part: table()[part] for part in ("models", "types")
        }
    for name in ("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration", "ViTModel", "MixtralForCausalLM"):
        assert renamed.applied(name) == table()["models"][name]


@pytest.mark.parametrize("model", MODELS)
def test_every_linear_layer_is_found_where_transformers_saved_it(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = MODELS[model]()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    built.save_pretrained(tmp_path)
    config, disk = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    found, renamings = names(disk, config), 0
    for name, parameter in built.named_parameters():
        places = found.find(name)
        assert places, name
        if parameter.ndim == 2:
            (place_,) = places
            stored = disk[place_.tensor]
            rows = stored if place_.rows is None else stored[slice(*place_.rows)]
            assert torch.equal(rows, parameter.data), name
        elif parameter.ndim == 3 and "experts" in name:
            for place_ in places:
                part = parameter.data[place_.expert][slice(*place_.out)]
                assert torch.equal(disk[place_.tensor], part), (name, place_)
        renamings += places[0].tensor != name
        assert found.find(places[0].tensor)  # an adapter of an older version has the name on disk
    assert renamings > 0


def test_a_header_is_read_without_tensors(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    base = read_checkpoint_header(tmp_path)
    assert (
        len(Names(base, config, find_tie(base, config), Problems()).find("model.layers.1.mlp.experts.gate_up_proj"))
        == 6
    )


def test_a_swap_of_names_applies_only_where_its_guard_is() -> None:
    config = {"architectures": ["Kimi_K25ForConditionalGeneration"]}
    renaming = Renaming(config)
    old = "vision_tower.encoder.blocks.0.mlp."
    new = "model.vision_tower.layers.0.mlp."
    assert {k: v[0].tensor for k, v in renaming.parts([f"{old}fc0.weight", f"{old}fc1.weight"]).items()} == {
        f"{new}fc1.weight": f"{old}fc0.weight", f"{new}fc2.weight": f"{old}fc1.weight",
    }  # fmt: skip
    already = [f"{new}fc1.weight", f"{new}fc2.weight"]
    assert {k: v[0].tensor for k, v in renaming.parts(already).items()} == dict(zip(already, already, strict=True))


def test_an_unknown_class_takes_the_renamings_of_its_model_type() -> None:
    (part,) = Renaming({"architectures": ["NovelForX"], "model_type": "llava"}).parts(["language_model.lm_head.weight"])
    assert part == "lm_head.weight"


# Prefixes -------------------------------------------------------------------------------------------------------------

TWO_TOWERS = {
    f"model.{tower}.layers.{n}.q.weight": (4, 6) for tower in ("language_model", "vision_tower") for n in (0, 1)
}


@pytest.mark.parametrize(
    ("module", "base", "tensor"),
    [
        ("layers.0.q", TWO_TOWERS, "model.language_model.layers.0.q.weight"),
        ("model.layers.0.q", TWO_TOWERS, "model.language_model.layers.0.q.weight"),
        ("model.language_model.layers.0.q", {"model.layers.0.q.weight": (4, 6)}, "model.layers.0.q.weight"),
        ("model.language_model.layers.0.q", {"layers.0.q.weight": (4, 6)}, "layers.0.q.weight"),
        ("vision_tower.layers.0.q", TWO_TOWERS, "model.vision_tower.layers.0.q.weight"),
    ],
)
def test_one_prefix_for_all_names_is_found(module: str, base: Shapes, tensor: str) -> None:
    landing = place(pair(module), base)
    assert list(landing.sites) == [tensor]
    assert {problem.severity for problem in landing.problems} <= {"info"}


def test_a_prefix_is_said_once_and_not_for_each_module() -> None:
    landing = place({**pair("model.layers.0.q"), **pair("model.layers.1.q")}, TWO_TOWERS)
    assert [(problem.code, problem.message) for problem in landing.problems] == [
        ("NAME_MATCHED", "2 names: model.language_model.… in the base")
    ]


@pytest.mark.parametrize(
    ("module", "base"),
    [
        ("model.layers.0.q", {"model.vision_tower.layers.0.q.weight": (4, 6)}),
        ("layers.0.q", {"vision_tower.layers.0.q.weight": (4, 6)}),
        ("vision_tower.layers.0.q", {"layers.0.q.weight": (4, 6)}),
        ("model.visual.layers.0.q", {"model.language_model.layers.0.q.weight": (4, 6)}),
        ("audio_tower.layers.0.q", {"model.layers.0.q.weight": (4, 6)}),
        ("model.layers.0.q", {"model.language_model.layers.0.q.weight": (5, 6)}),  # nor where the shape is another
        ("encoder.layers.0.q", {"model.decoder.layers.0.q.weight": (4, 6)}),
    ],
)
def test_no_prefix_leads_into_another_model(module: str, base: Shapes) -> None:
    landing = place(pair(module), base)
    assert (landing.sites, [problem.code for problem in landing.problems]) == ({}, ["NO_SUCH_MODULE"])


def test_a_prefix_gives_every_name_a_place() -> None:
    """Layer 0 alone would fit both; the other layers tell."""
    base = {f"model.{part}.layers.0.q.weight": (4, 6) for part in ("text_model", "decoder")}
    base["model.text_model.layers.1.q.weight"] = (4, 6)
    landing = place({**pair("layers.0.q"), **pair("layers.1.q")}, base)
    assert sorted(landing.sites) == [f"model.text_model.layers.{n}.q.weight" for n in (0, 1)]
