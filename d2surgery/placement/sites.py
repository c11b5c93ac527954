"""Where adapters land: which rows of which tensors on disk, from names and shapes only, before any work.

A module's name in an adapter file is its name in the model; the base's file may spell it otherwise. In this order:
as transformers renames and fuses tensors on loading (`names`); the exact name; the same after adding or removing a
prefix (`GPT2Model` files lack `transformer.`); an output tied to the input embedding, which is not on disk at all.
Every misfit is collected; nothing here reads tensor data or imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from d2surgery.errors import Problem, Problems, brief
from d2surgery.files.header import Header
from d2surgery.formats.layout import AdapterLayout, Layout, Rows
from d2surgery.placement.names import Names
from d2surgery.placement.orientation import Patches
from d2surgery.placement.site import OUTPUTS, Patch, Site, is_head
from d2surgery.placement.ties import Tie, find_tie
from d2surgery.placement.untying import Settlement

# Models whose embedding module normalises what it looks up: an update beside the module is no change of the weight.
_NORMED_EMBEDDINGS = frozenset(
    f"{family}{part}"
    for family in ("muse_spark", "muse_glimmer", "inkling", "inkling2", "inkling_mm_model")
    for part in ("", "_text")
)


@dataclass(frozen=True)
class Landing:
    """The sites of an adapter in a base, and what stands in the way."""

    sites: Mapping[str, Site]  # by the tensor's name in the merged checkpoint
    untied: bool  # the merged checkpoint needs tie_word_embeddings = false
    vocab_size: int | None  # when a replaced embedding has another number of rows
    twins: tuple[tuple[str, str], ...]  # keys that ensure_weight_tying says hold the same numbers, perhaps transposed
    problems: tuple[Problem, ...]


def sites(layout: Layout, base: Header, base_config: Mapping[str, Any]) -> Landing:
    """Find every tensor that the adapter touches. Problems are returned, not raised: the caller decides."""
    say, tie = Problems(), find_tie(base, base_config)
    if (quantized := base_config.get("quantization_config")) is not None:
        say("QUANTIZED_BASE", f"quantization_config: {brief(quantized.get('quant_method', 'unknown method'))}")
    names = Names(base, base_config, tie, say)
    patches = Patches(base, base_config, names, say, hint=layout.about.transposed)
    finder = _Finder(layout, base, base_config, tie, names, patches, say)
    finder.land()
    ties = Settlement(layout, base, tie, finder.sites, say)
    ties.settle()
    ties.check_vocabulary(finder.vocab_size)
    return Landing(
        sites={name: ties.sites[name] for name in sorted(ties.sites)},
        untied=ties.untied,
        vocab_size=finder.vocab_size,
        twins=tuple(ties.twins),
        problems=tuple(say.all),
    )


@dataclass
class _Finder:
    layout: Layout
    base: Header
    config: Mapping[str, Any]
    tie: Tie
    names: Names
    patches: Patches
    say: Problems
    sites: dict[str, Site] = field(default_factory=dict)
    vocab_size: int | None = None

    def land(self) -> None:
        wanted = {_name(adapter): adapter.out_features * adapter.in_features * adapter.experts
                  for adapter in self.layout.adapters.values()}  # fmt: skip
        self.names.settle(wanted | dict.fromkeys(self.layout.rows, 0))
        for target, key in self.layout.replacements.items():
            self._replace(target, key)
        for adapter in self.layout.adapters.values():
            self._patch(adapter)
        for target, rows in self.layout.rows.items():
            self._replace_rows(target, rows)

    def _replace(self, target: str, key: str) -> None:
        shape = self.layout.header.tensors[key].shape
        places = self.names.find(target)
        if not places:  # a new head: modules_to_save may add what the base lacks
            if self.tie.unknown_output and self.tie.flagged and not self.tie.aliases and "lm_head" in target:
                self.say("UNKNOWN_TIE", "the output is tied, and is saved in full", module=target)
            self.sites[target] = Site(source=None, shape=shape, replacement=key)
            return
        tensor = places[0].tensor
        if tensor in self.sites:
            self.say("AMBIGUOUS_MODULE", "replaced twice", module=tensor, got=f"again as {target}")
            return
        want = self._stored_shape(tensor)
        if shape != want and not self._is_new_head(target, tensor, shape, want):
            if not self._resizes(tensor, shape, want):
                self.say("SHAPE_MISMATCH", "replacement", module=target, wanted=str(want), got=str(shape))
                return
            self.vocab_size = shape[0]
        self.sites[tensor] = Site(source=self._source(tensor), shape=shape, replacement=key)

    def _is_new_head(self, target: str, tensor: str, shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
        """A classification head with another number of labels, all of its module saved."""
        module, trained = tensor.rpartition(".")[0], target.rpartition(".")[0]
        saved = self.layout.replacements
        whole = (
            saved.get(f"{trained}.{name.removeprefix(module + '.')}")
            for name in self.base.tensors
            if name.rpartition(".")[0] == module
        )
        rows = {self.layout.header.tensors[key].shape[:1] if key else () for key in whole}
        return is_head(tensor) and len(shape) == len(want) and shape[1:] == want[1:] and rows == {shape[:1]}

    def _resizes(self, tensor: str, shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
        """An embedding, its tied output or an output's bias may have another number of tokens."""
        module = tensor.rpartition(".")[0]
        is_vocabulary = tensor == self.tie.embedding or tensor in self.tie.aliases or module.endswith(OUTPUTS)
        return is_vocabulary and len(shape) == len(want) and shape[1:] == want[1:]

    def _replace_rows(self, target: str, rows: Rows) -> None:
        places = self.names.find(target)
        if not places:
            self.names.missing(target.removesuffix(".weight"))
            return
        tensor = places[0].tensor
        site = self.sites.get(tensor) or Site(source=self._source(tensor), shape=self._stored_shape(tensor))
        if site.rows is not None:
            self.say("AMBIGUOUS_MODULE", "its rows are replaced twice", module=tensor, got=f"again as {target}")
            return
        width = self.layout.header.tensors[rows.key].shape[1:]
        if max(rows.indices) >= site.shape[0] or width != site.shape[1:]:
            want, got = f"rows below {site.shape[0]} of {site.shape[1:]}", f"{max(rows.indices)} of {width}"
            self.say("SHAPE_MISMATCH", "token rows", module=target, wanted=want, got=got)
            return
        self.sites[tensor] = replace(site, rows=rows)

    def _patch(self, adapter: AdapterLayout) -> None:
        if adapter.stored == "embedding" and _model_types(self.config) & _NORMED_EMBEDDINGS:
            self.say("NORMED_EMBEDDING", "PEFT adds the update after the norm", module=adapter.module)
            return
        places = self.names.find(_name(adapter))
        if not places:
            self.names.missing(adapter.module)
            return
        held = [place.out[1] - place.out[0] for place in places if place.expert == 0 and place.out[1] is not None]
        if held and (sum(held), places[-1].expert + 1) != (adapter.out_features, adapter.experts):
            want, got = (
                f"{places[-1].expert + 1} experts of {sum(held)}",
                f"{adapter.experts} of {adapter.out_features}",
            )
            self.say("SHAPE_MISMATCH", "experts", module=adapter.module, wanted=want, got=got)
            return
        for place in places:
            tensor = place.tensor
            site = self.sites.get(tensor) or Site(source=self._source(tensor), shape=self._stored_shape(tensor))
            if patches := self.patches.of(adapter, place, site.shape):
                if twice := [old.module for old in site.patches if _overlap(old, patches)]:
                    self.say("AMBIGUOUS_MODULE", "adapted twice", module=tensor, got=f"{adapter.module}, {twice[0]}")
                    return
                together = sorted((*site.patches, *patches), key=lambda patch: patch.start)
                self.sites[tensor] = replace(site, patches=tuple(together))
        if "bias" in adapter.slots:
            self._add_bias(adapter)

    def _add_bias(self, adapter: AdapterLayout) -> None:
        places = self.names.find(f"{adapter.module}.bias")
        if not places:
            self.say("NO_SUCH_MODULE", "lora_bias, but the base module has no bias", module=f"{adapter.module}.bias")
            return
        tensor = places[0].tensor
        site = self.sites.get(tensor) or Site(source=tensor, shape=self._stored_shape(tensor))
        if prod(site.shape) != adapter.out_features:
            want = str(site.shape)
            self.say("SHAPE_MISMATCH", "bias", module=tensor, wanted=want, got=str(adapter.out_features))
            return
        self.sites[tensor] = replace(site, bias=adapter.module)

    def _source(self, tensor: str) -> str:
        return tensor if tensor in self.base.tensors else self.tie.aliases[tensor]

    def _stored_shape(self, tensor: str) -> tuple[int, ...]:
        return self.base.tensors[self._source(tensor)].shape


def _model_types(config: Mapping[str, Any]) -> set[Any]:
    text = config.get("text_config")
    return {config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None}


def _name(adapter: AdapterLayout) -> str:
    return adapter.module if adapter.stored == "experts" else f"{adapter.module}.weight"


def _overlap(patch: Patch, others: tuple[Patch, ...]) -> bool:
    return any(patch.start < other.stop and other.start < patch.stop for other in others)
