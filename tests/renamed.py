"""Derives `d2surgery/placement/renamings.json` from the installed transformers.

    python tests/renamed.py

`mappings`: key of transformers' conversion mapping -> its rules in order, or the key that has the same. A rule is
[pattern, targets, operations]: the pattern is the one that transformers compiles, group `g1` is its second source;
operations is null for a renaming.
`models`: class -> [[scope, base model prefix, key], …], what transformers applies to a checkpoint of it, in order.
`plain`: classes of such model types to which it applies nothing.
`types`: model type -> the class to take where the config names an unknown one.
"""

import json
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import conversion_mapping
from transformers import core_model_loading as loading
from transformers.models.auto import configuration_auto, modeling_auto

TABLE = Path(__file__).resolve().parents[1] / "d2surgery" / "placement" / "renamings.json"


def _without_timm(config: Any) -> None:
    config.use_timm_backbone, config.backbone = False, None
    config.backbone_config = transformers.ResNetConfig(depths=[1, 1, 1, 1], out_features=["stage4"])


REPAIRS: dict[str, Callable[[Any], None]] = {  # defaults that contradict themselves, or need another package
    "AyaVision": lambda config: setattr(config.vision_config, "num_attention_heads", 16),
    "Detr": _without_timm,
}
SINGLE = ("legacy",)  # said once, for every model


def rule(transform: Any) -> list[Any]:
    """One transform as data."""
    operations: Any = None
    if isinstance(transform, loading.WeightConverter):
        steps = transform.operations
        operations = [[type(op).__name__, *(v for v in vars(op).values() if type(v) in (int, bool))] for op in steps]
    elif isinstance(transform, loading.GroupWeightRename):
        operations = "group"
    elif type(transform) not in (loading.WeightRenaming, loading.PrefixChange):
        operations = [[type(transform).__name__]]
    return [transform.compiled_sources.pattern, list(transform.target_patterns), operations]


def mappings() -> dict[str, list[Any]]:
    conversion_mapping.get_checkpoint_conversion_mapping("legacy")
    found = conversion_mapping._checkpoint_conversion_mapping_cache
    return {key: [rule(transform) for transform in transforms] for key, transforms in sorted(found.items())}


def classes() -> dict[str, str]:
    """Model class -> model type, of every class that an Auto class loads."""
    found: dict[str, str] = {}
    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES"):
            for model_type, value in table.items():
                for one in (value,) if isinstance(value, str) else value:
                    found.setdefault(one, model_type)
    return dict(sorted(found.items()))


def folder(kind: type) -> str:
    return kind.__module__.split(".")[2]  # transformers.models.<folder>.modeling_…


@cache
def concerned() -> set[str]:
    """The folders of models that some mapping names."""
    keys = set(conversion_mapping._checkpoint_conversion_mapping_cache or mappings())
    names = {name for name, model_type in classes().items() if {name, model_type} & keys}
    names |= {key for key in keys if key[0].isupper() and hasattr(transformers, key)}
    types = {configuration_auto.model_type_to_module_name(key) for key in keys}
    return {folder(getattr(transformers, name)) for name in names} | types


def may_be_renamed(config: Any) -> bool:
    nested = [value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)]
    return folder(type(config)) in concerned() or any(map(may_be_renamed, nested))


def applied(name: str) -> list[list[str | None]]:
    """What transformers applies to a checkpoint of a class: scope, base model prefix and key of each list, in order."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    if not may_be_renamed(config):
        return []
    shorten(config)
    for part, repair in REPAIRS.items():
        if part in name and (
            part != "Detr" or getattr(config, "use_timm_backbone", False) or hasattr(config, "backbone_config")
        ):
            repair(config)
    with torch.device("meta"):
        model = kind(config)
    return applied_to(model)


def applied_to(model: Any) -> list[list[str | None]]:
    asked: list[list[str | None]] = []
    real = conversion_mapping.get_checkpoint_conversion_mapping

    def remembering(key: str) -> Any:
        if (transforms := real(key)) is not None:
            for transform in transforms:
                transform.quantization_operation = key  # a slot that is free here
        return transforms

    conversion_mapping.get_checkpoint_conversion_mapping = remembering
    try:
        for transform in conversion_mapping.get_model_conversion_mapping(model, add_legacy=False):
            entry = [transform.scope_prefix, transform.base_model_prefix, transform.quantization_operation]
            if entry not in asked:
                asked.append(entry)
    finally:
        conversion_mapping.get_checkpoint_conversion_mapping = real
    return asked


def guessed(name: str, model_type: str) -> list[list[str | None]]:
    """The same for a class that its own defaults cannot build: what its name, type and base model have mappings for."""
    keys, kind = mappings(), getattr(transformers, name, None)
    base = modeling_auto.MODEL_MAPPING_NAMES.get(model_type, "")
    found: list[list[str | None]] = [[None, None, key] for key in (name, model_type) if key in keys][:1]
    if base in keys and base != name and kind is not None:
        found.append(["", kind.base_model_prefix, base])
    return found


def shorten(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shorten(value)
        elif name in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers") and value:
            try:
                setattr(config, name, min(value, 2))
            except Exception:  # a property
                continue


def table() -> dict[str, Any]:
    models: dict[str, list[list[str | None]]] = {}
    types: dict[str, str] = {}
    none: list[str] = []
    for name, model_type in classes().items():
        try:
            entries = applied(name)
        except Exception as error:  # an architecture that its own defaults cannot build
            print(f"{name}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            entries = guessed(name, model_type)
        if not entries:
            none.append(name)
        else:
            models[name] = entries
            best = types.get(model_type)
            if best is None or len(entries) > len(models[best]):
                types[model_type] = name
    plain = [name for name in none if classes()[name] in types]
    used = {entry[2] for entries in models.values() for entry in entries} | set(SINGLE)
    rules: dict[str, Any] = {}
    for key, value in mappings().items():
        if key in used:
            same = next((other for other, old in rules.items() if old == value), None)
            rules[key] = same or value
    return {
        "transformers": transformers.__version__,
        "mappings": rules,
        "models": models,
        "plain": plain,
        "types": types,
    }


def lines(found: dict[str, Any]) -> str:
    """JSON with one line per mapping and model, so that a difference can be read."""
    parts = [f' "transformers": {json.dumps(found["transformers"])}']
    for part in ("mappings", "models", "types"):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found[part].items())
        parts.append(f' "{part}": {{\n{rows}\n }}')
    parts.insert(3, f' "plain": {json.dumps(found["plain"])}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    TABLE.write_text(lines(table()))
