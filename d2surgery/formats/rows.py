"""Rows that lie otherwise than in transformers: a head's two halves interleaved, or several modules in one.

    interleaved   row (head, half, i) at (head, i, half): Meta's, llama.cpp's, torchtune's q and k
    fused         q | k | v and gate | up under each other
    grouped       Megatron's linear_qkv: for each key-value head its queries, its key, its value

Who has which order, the format says; how many heads there are, the base's config.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from d2surgery.errors import refuse
from d2surgery.formats.layout import AdapterLayout, Slot

if TYPE_CHECKING:
    from torch import Tensor

LIKE_LLAMA = (  # transformers' model types whose blocks have q_proj, k_proj, v_proj, gate_proj and up_proj of their own
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "olmo", "olmo2", "smollm3",
)  # fmt: skip


class Heads(NamedTuple):
    """How the rows of a model's attention are shared out."""

    query: int
    kv: int
    size: int  # rows of one head

    @property
    def qkv(self) -> tuple[int, int, int]:
        """The rows of q, k and v."""
        return self.query * self.size, self.kv * self.size, self.kv * self.size


def heads_of(model: Mapping[str, Any]) -> Heads | None:
    """By a model's config, or that of the language model in it; None where it does not say."""
    found = model.get("text_config")
    text = found if isinstance(found, Mapping) else model
    query, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    kv = text.get("num_key_value_heads", query)
    size = text.get("head_dim")
    if size is None and type(query) is type(hidden) is int and query > 0:
        size = hidden // query
    heads = Heads(*(count if type(count) is int else 0 for count in (query, kv, size)))
    return heads if min(heads) > 0 and heads.query % heads.kv == 0 else None


def halves(heads: int, rows: "Tensor") -> "Tensor":
    """Row (head, i, half) at (head, half, i), as transformers has them."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def interleaved(heads: int, rows: "Tensor") -> "Tensor":
    """Row (head, half, i) at (head, i, half): the inverse of `halves`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def of_group(heads: Heads, which: int, rows: "Tensor") -> "Tensor":
    """The rows of q (0), k (1) or v (2) out of groups of one key-value head each."""
    each = heads.query // heads.kv
    start, stop = ((0, each), (each, each + 1), (each + 1, each + 2))[which]
    grouped = rows.reshape(heads.kv, each + 2, heads.size, *rows.shape[1:])
    return grouped[:, start:stop].reshape(-1, *rows.shape[1:])


def reordered(entry: AdapterLayout, made: Any) -> AdapterLayout:
    """The entry with the rows of its output through `made`; A has none of them."""
    per_input = entry.settings.get("along") == "in_features"
    kept = ("A", "magnitude") if per_input else ("A",)
    return replace(entry, slots={n: slot if n in kept else _through(slot, made) for n, slot in entry.slots.items()})


def _through(slot: Slot, made: Any) -> Slot:
    return slot._replace(made=made if slot.made is None else partial(_then, slot.made, made))


def _then(first: Any, then: Any, *tensors: "Tensor") -> "Tensor":
    made: Tensor = then(first(*tensors))
    return made


def other_half_first(rows: "Tensor") -> "Tensor":
    """scale | shift of shift | scale."""
    return rows.roll(rows.shape[0] // 2, 0)


def cut(entry: AdapterLayout, parts: Sequence[tuple[str, int]]) -> Iterator[AdapterLayout]:
    """One entry as those of the modules whose rows follow each other in it: module, how many rows. All share A."""
    start = 0
    for module, size in parts:
        kept = {name: slot if name == "A" else slot._replace(rows=(start, start + size))
                for name, slot in entry.slots.items()}  # fmt: skip
        yield replace(entry, module=module, slots=kept, out_features=size)
        start += size


def stacked(sizes: Sequence[int], enabled: Sequence[bool], B: "Tensor") -> "Tensor":
    """B of several products below each other (loralib's MergedLinear) as one factor: block by block, zeros elsewhere.

    B holds the rows of the enabled parts, each with the same rank; the parts have `sizes` rows.
    """
    rank, start, taken, block = B.shape[1], 0, 0, 0
    whole = B.new_zeros(sum(sizes), rank * sum(enabled))
    for size, is_there in zip(sizes, enabled, strict=True):
        if is_there:
            columns = slice(block * rank, (block + 1) * rank)
            whole[start : start + size, columns] = B[taken : taken + size]
            taken, block = taken + size, block + 1
        start += size
    return whole


def undecided(*tensors: "Tensor") -> "Tensor":
    """For a slot whose numbers nobody can place yet."""
    raise refuse("HEADS_UNKNOWN", "which rows are whose")


def fused(key: str) -> Slot:
    return Slot(key, made=undecided)


def by_group(entry: AdapterLayout, heads: Heads, modules: Sequence[str]) -> Iterator[AdapterLayout]:
    """A grouped entry as those of q, k and v."""
    for which, (module, size) in enumerate(zip(modules, heads.qkv, strict=True)):
        part = reordered(entry, partial(of_group, heads, which))
        yield replace(part, module=module, out_features=size)
