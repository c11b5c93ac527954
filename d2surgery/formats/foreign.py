"""Adapter formats that this version recognises by their keys but does not read.

    format        down factor                      up factor                      ranks from
    x A B         <name>.lora_A (in, r)            <name>.lora_B (r, out)          columns of lora_A, by the shapes
    kohya, PEFT   their names, with factors that lie the other way round           columns of down, by the shapes
    lycoris, …    recognised by one leaf, not taken apart

A magnitude beside a pair makes it DoRA: `magnitude` or `lora_magnitude_vector`.

`inspect` prints modules and ranks; the scaling is unknown, so `merge` refuses.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from d2surgery.errors import Problem
from d2surgery.files.header import Header
from d2surgery.formats.format import Values, as_read, holds_nothing, not_written
from d2surgery.formats.layout import About, AdapterLayout, Layout, Slot, lies_transposed


class _Pairs(NamedTuple):
    format: str
    down: str
    up: str
    transposed: bool = False


_PAIRED = (
    _Pairs("kohya", ".lora_down.weight", ".lora_up.weight"),
    _Pairs("x A B", ".lora_A.weight", ".lora_B.weight"),
    _Pairs("x A B", ".lora.lora_A", ".lora.lora_B", transposed=True),
    _Pairs("x A B", ".lora_A", ".lora_B", transposed=True),
)
_MAGNITUDES = (".magnitude", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
# Names that models have and adapters lack: embeddings, heads, numbered layers.
_OF_MODELS = re.compile(
    r"(^|[._])(embed_tokens|wte|word_embeddings|embeddings|patch_embed\w*|shared|lm_head|conv_in|conv_out)\."
    r"|(^|[._])(layers?|h|blocks?|stages?|resnets)\.\d+\."
)
_LEAVES = {  # leaf -> format, where no pair is taken apart
    "hada_w1_a": "PEFT LoHa without its config",
    "lokr_w1": "PEFT LoKr without its config",
    "lokr_w1_a": "PEFT LoKr without its config",
    "oft_blocks": "lycoris (OFT)",
    "vera_lambda_b": "PEFT VeRA without its config",
    "oft_R": "PEFT OFT without its config",
    "boft_R": "PEFT BOFT without its config",
    "ia3_l": "PEFT IA3 without its config",
    "prompt_embeddings": "PEFT prompt tuning without its config",
}


NAME = "foreign"
TITLE, READS = "OFT, VeRA, IA³ …", "recognised, not read"

with_base, holds, write = as_read, holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    """Every file: one that fits no table is of the format "unknown"."""
    return "no other format's keys"


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    """By the table that most keys fit."""
    if not header.tensors:
        return _layout(header, config, "unknown", {}, "NOTHING_TO_APPLY", "no tensor in the file")
    counts = [sum(key.endswith(pairs.down) for key in header.tensors) for pairs in _PAIRED]
    leaves = Counter(_LEAVES[leaf] for key in header.tensors for leaf in key.split(".") if leaf in _LEAVES)
    if not any(counts) and not leaves:
        if any(_OF_MODELS.search(key) for key in header.tensors):
            message = f"the weights of a model: {len(header.tensors)} tensors, none of them a factor"
            return _layout(header, config, "unknown", {}, "NOT_AN_ADAPTER", message)
        return _layout(header, config, "unknown", {}, "UNKNOWN_FORMAT", "no adapter's keys")
    if max(counts) < sum(leaves.values()) or not any(counts):
        name = leaves.most_common(1)[0][0]
        return _layout(header, config, name, {}, "FOREIGN_FORMAT", f"the keys are those of {name}")
    pairs = _PAIRED[counts.index(max(counts))]
    if lies_transposed(_shapes(header, pairs)):
        pairs = pairs._replace(transposed=True)
    adapters = {a.module: a for key in header.tensors if (a := _adapter(header, key, pairs)) is not None}
    message = f"the keys are those of {pairs.format}: {len(adapters)} pairs"
    return _layout(header, config, pairs.format, adapters, "FOREIGN_FORMAT", message)


def _shapes(header: Header, pairs: _Pairs) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for key, info in header.tensors.items():
        up = header.tensors.get(key.removesuffix(pairs.down) + pairs.up)
        if key.endswith(pairs.down) and up is not None and not pairs.transposed:
            yield info.shape, up.shape


def _layout(
    header: Header,
    config: Mapping[str, Any] | None,
    format: str,
    adapters: Mapping[str, AdapterLayout],
    code: str,
    message: str,
) -> Layout:
    used = {key for adapter in adapters.values() for key in (*adapter.keys.values(), *adapter.numbers)}
    base = (config or {}).get("base_model_name_or_path")
    problem = Problem(code=code, message=message, file=str(header.files[0]))
    unread = tuple(key for key in header.tensors if key not in used)
    return Layout(
        path=header.files[0],
        format=format,
        header=header,
        about=About(base_model=base if isinstance(base, str) else None),
        adapters=adapters,
        unread=unread,
        problems=(problem,),
    )


def _adapter(header: Header, key: str, pairs: _Pairs) -> AdapterLayout | None:
    up_key = key.removesuffix(pairs.down) + pairs.up
    if not key.endswith(pairs.down) or up_key not in header.tensors:
        return None
    down, up = header.tensors[key], header.tensors[up_key]
    if min(len(down.shape), len(up.shape)) < 2:
        return None
    down_shape = down.shape[::-1] if pairs.transposed else down.shape
    up_shape = up.shape[::-1] if pairs.transposed else up.shape
    module = key.removesuffix(pairs.down)
    kernel = down_shape[2:]
    magnitude = next((name for end in _MAGNITUDES if (name := module + end) in header.tensors), None)
    kind, slots = "lora", {"A": Slot(key, pairs.transposed), "B": Slot(up_key, pairs.transposed)}
    settings: dict[str, Any] = {}
    if magnitude is not None:
        kind, slots["magnitude"] = "dora", Slot(magnitude)
        settings["along"] = "out_features"
    return AdapterLayout(
        module=module,
        kind=kind,
        stored="conv" if kernel else "linear",
        slots=slots,
        ranks={"update": down_shape[0]},
        out_features=up_shape[0],
        in_features=prod(down_shape[1:]),
        dtype=down.dtype,
        scaling=None,
        settings=settings,
        kernel=(down_shape[1], *kernel) if kernel else (),
    )
