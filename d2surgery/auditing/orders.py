"""A delta that landed in the wrong place: its rows in another order, another expert's, another layer's, a sibling's."""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from d2surgery.auditing.case import Case, Named
from d2surgery.formats.layout import Layout
from d2surgery.placement.site import Patch

_QKV = ("qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "attn_qkv", "linear_qkv")
_GATED = ("gate_up_proj", "linear_fc1")
_MOST = 1024  # experts, or layers
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def heads(case: Case) -> Iterator[Named]:
    """Rotary embeddings in halves (transformers) or interleaved (the original Llama): rows of q and k, per head."""
    size = head_size(case)
    if size is None or case.base.shape[0] % size or size % 2:
        return
    rows = torch.arange(case.base.shape[0])
    order = rows.view(-1, 2, size // 2).transpose(1, 2).reshape(-1)
    yield from _turned(case, "HEADS_PERMUTED", "rows of each head permuted", order, "halves", "interleaved")


def fused(case: Case) -> Iterator[Named]:
    """Rows of a fused query, key and value, one after the other or by group of heads; of gate and up."""
    out = case.entry.out_features
    if case.base.shape[0] != out or not is_fused(case.module):
        return
    rows = torch.arange(out)
    if case.module.endswith(_GATED) and out % 2 == 0:
        pairs = rows.view(2, -1).T.reshape(-1)
        yield from _turned(case, "ROWS_PERMUTED", "gate and up", pairs, "halves", "interleaved")
        yield from _moved(case, "ROWS_PERMUTED", "gate and up exchanged", rows.roll(out // 2))
    elif (sizes := _attention(case)) is not None:
        size, query, groups = sizes
        if groups and query % groups == 0 and (query + 2 * groups) * size == out:
            q, k, v = (
                part.view(groups, -1) for part in torch.split(rows, [query * size, groups * size, groups * size])
            )
            order = torch.cat([q, k, v], dim=1).reshape(-1)
            yield from _turned(case, "ROWS_PERMUTED", "query, key and value", order, "blocks", "groups of heads")


def is_fused(module: str) -> bool:
    """Whether rows of several kinds lie in one weight, by its name."""
    return module.rpartition(".")[2] in (*_QKV, *_GATED)


def misplaced(case: Case) -> Iterator[Named]:
    for where, adapter in case.others.items():
        yield Named("DELTA_MISPLACED", f"the delta of {where}", lambda adapter=adapter: case.with_(adapter()))  # type: ignore[misc]


def other_places(layout: Layout, patch: Patch) -> Iterator[tuple[str, Patch]]:
    """Whose delta a merger may have taken for a patch's: words, and the patch with it. Of the same shape each: the
    expert or layer that another way of counting gives, a sibling in the same block, the other half of gate and up."""
    entry = layout.adapters[patch.module]
    shape = (entry.stored, entry.out_features, entry.in_features, entry.experts)
    for number in _miscounted(patch.expert, range(entry.experts)):
        yield f"expert {number}", patch._replace(expert=number)
    half = entry.out_features // 2
    if patch.out in ((0, half), (half, None), (half, 2 * half)) and half:
        yield "the other half, gate or up", patch._replace(out=(0, half) if patch.out[0] else (half, None))
    for module in _named_alike(layout, patch.module):
        other = layout.adapters[module]
        if (other.stored, other.out_features, other.in_features, other.experts) == shape:
            yield module, patch._replace(module=module)


def _named_alike(layout: Layout, module: str) -> Iterator[str]:
    """Siblings, and the same in the layer or expert that is taken for this one's."""
    block = module.rpartition(".")[0]
    siblings = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
                "to_q", "to_k", "to_v")  # fmt: skip
    yield from (f"{block}.{leaf}" for leaf in siblings if f"{block}.{leaf}" in layout.adapters.keys() - {module})
    for found in _NUMBER.finditer(module):
        before, after = module[: found.start()], module[found.end() :]
        numbers = [number for number in range(_MOST) if f"{before}{number}{after}" in layout.adapters]
        if int(found[0]) in numbers:
            yield from (f"{before}{number}{after}" for number in _miscounted(int(found[0]), numbers))


def _miscounted(number: int, of: Sequence[int]) -> Iterator[int]:
    """One more, one less, from the end, and as text is sorted: 0, 1, 10, 11, 2 …"""
    if len(of) < 2:
        return
    at, text = of.index(number), sorted(of, key=str)
    others = (of[(at + 1) % len(of)], of[at - 1], of[-1 - at], text[at], of[text.index(number)])
    yield from dict.fromkeys(other for other in others if other != number)


def head_size(case: Case) -> int | None:
    """Rows per attention head of a query or key weight; None for another module."""
    if not case.module.endswith(("q_proj", "k_proj", "query", "key", ".q", ".k", "wq", "wk")):
        return None
    sizes = _attention(case)
    return sizes[0] if sizes else None


def _attention(case: Case) -> tuple[int, int, int] | None:
    """Rows per head, query heads, key-value heads of the base's config; 0 for heads that it does not say."""
    text = case.base_config.get("text_config")
    config = {**case.base_config, **(text if isinstance(text, Mapping) else {})}
    size, hidden = config.get("head_dim"), config.get("hidden_size", config.get("n_embd"))
    query = config.get("num_attention_heads", config.get("n_head"))
    if not size and query and hidden:
        size = hidden // query
    kv = config.get("num_key_value_heads") or query
    if not isinstance(size, int):
        return None
    return size, *(heads if isinstance(heads, int) else 0 for heads in (query, kv))  # type: ignore[return-value]


def _turned(case: Case, code: str, what: str, order: Tensor, one: str, other: str) -> Iterator[Named]:
    yield from _moved(case, code, f"{what} from {one} to {other}", order)
    yield from _moved(case, code, f"{what} from {other} to {one}", order.argsort())


def _moved(case: Case, code: str, what: str, order: Tensor) -> Iterator[Named]:
    yield Named(code, f"{what}, in the delta", lambda: case.base + case.delta[order])
    yield Named(code, f"{what}, in base and delta", lambda: case.right[order])
