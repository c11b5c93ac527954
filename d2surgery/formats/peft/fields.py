"""The fields of adapter_config.json that are read: what each may be."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from d2surgery.errors import brief
from d2surgery.formats.layout import Packing
from d2surgery.formats.patterns import BadExpression, Matcher

FORMS = ("projected_plus_update", "projected", "update")
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern")
PACKED = "lora_B_layout"  # unsloth's field, from September 2026
PACKINGS: dict[str, Packing] = {"rank_major": "interleaved", "grouped_by_expert": "grouped"}
_EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")
_MOST, _SHOWN = 20_000, 20  # names in a list, and faults of one field that are told
PLAIN = re.compile(r"[\w.]*")


def misfits(found: Mapping[str, Any], matcher: Matcher) -> Iterator[tuple[str, dict[str, str]]]:
    """Each field that cannot be used, and what is wrong with it."""
    for name, (wanted, fits) in _CHECKS.items():
        if name in found and not fits(found[name]):
            yield name, {"message": f"{name} cannot be used", "wanted": wanted, "got": brief(found[name])}
    for name in _EXPRESSIONS:
        value = found.get(name)
        try:
            wrong = "" if isinstance(value, str) or _is_names(value) else brief(value)
            if not wrong:
                for each in value if name == "layers_pattern" and isinstance(value, list) else [value]:
                    _ = matcher.compile(each) if isinstance(each, str) else None
        except BadExpression as error:
            wrong = f"{brief(value)}: {brief(error)}"
        if wrong:
            wanted = "names or a regular expression"
            yield name, {"message": f"{name} cannot be used", "wanted": wanted, "got": wrong}
    for name in _PATTERN_FIELDS:
        patterns = found.get(name) or {}
        if not is_table(patterns):
            yield name, {"message": f"{name} is not an object", "got": type(patterns).__name__}
            continue
        for key in sorted(patterns.keys() - good(name, found, matcher).keys())[:_SHOWN]:
            yield name, {"message": f"{name} entry {brief(key)!r}", "wanted": "a regular expression and a number"}


def good(name: str, found: Mapping[str, Any], matcher: Matcher) -> dict[str, Any]:
    """The entries of a pattern field that can be used."""
    patterns = found.get(name) or {}
    if not is_table(patterns):
        return {}
    return {
        key: value
        for key, value in patterns.items()
        if _is_pattern_value(name, value) and (PLAIN.fullmatch(key) or _is_regex(key, matcher))
    }


def is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_regex(pattern: str, matcher: Matcher) -> bool:
    try:
        matcher.compile(pattern)
    except BadExpression:
        return False
    return True


def _is_pattern_value(field: str, value: Any) -> bool:
    if field == "alpha_pattern":
        return is_number(value)
    return _is_rank(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_rank, value)))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and so not NaN


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_names(value: Any) -> bool:
    some = isinstance(value, list) and len(value) <= _MOST
    return value is None or (some and all(isinstance(name, str) and len(name) <= 1000 for name in value))


def _is_layers(value: Any) -> bool:
    some = isinstance(value, list) and len(value) <= _MOST
    return value is None or type(value) is int or (some and all(type(n) is int for n in value))


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> what is wanted of it, and the test
    **dict.fromkeys(("r", "r1", "r2"), ("an integer from 1", _is_rank)),
    **dict.fromkeys(("lora_alpha", "tau"), ("a finite number", is_number)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), ("true or false", _is_flag)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ("a list of names", _is_names)),
    "peft_type": ("a name", lambda value: isinstance(value, str)),
    "layers_to_transform": ("layer numbers", _is_layers),
    "trainable_token_indices": ("row numbers", lambda v: v is None or isinstance(v, list | dict)),
    "along": ("in_features or out_features", lambda value: value in ("in_features", "out_features")),
    "form": (", ".join(FORMS), lambda value: value in FORMS),
    PACKED: (" or ".join(PACKINGS), lambda value: value is None or value in [*PACKINGS]),
    "bias": ("none, all or lora_only", lambda value: value in (None, "none", "all", "lora_only")),
}
