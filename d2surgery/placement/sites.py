"""Where adapters land: which rows of which tensors on disk, from names and shapes only, before any work.

A module's name in an adapter file is its name in the model; the base's file may spell it otherwise. In this order:
the exact name; a model's renamed blocks and experts (fused in the model, one tensor per expert on disk); the same
after adding or removing the base model's prefix (`GPT2Model` files lack `transformer.`); an output tied to the input
embedding, which is not on disk at all. Every misfit is collected; nothing here reads tensor data or imports torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from typing import Any, NamedTuple

from d2surgery.errors import Problem, Severity
from d2surgery.files.header import FLOATS, Header
from d2surgery.formats.layout import AdapterLayout, Layout, Rows
from d2surgery.placement.ties import find_tie


class Patch(NamedTuple):
    """One adapter on a range of rows of a stored tensor, seen as the matrix (prod(shape[:-1]) or shape[0], rest).

    `transposed`: the rows of the tensor are in_features of the adapter, not out_features.
    `out`: from which to which out_features of the adapter land here (one expert's gate, say; None: to the last);
    `expert`: of which expert.
    """

    module: str
    start: int
    stop: int
    transposed: bool = False
    out: tuple[int, int | None] = (0, None)
    expert: int = 0


@dataclass(frozen=True, kw_only=True)
class Site:
    """All that happens to one tensor: replaced by `replacement`, rows replaced, then patched, bias added."""

    source: str | None  # the base tensor; None when the adapter brings a tensor that the base lacks
    shape: tuple[int, ...]  # of the result
    patches: tuple[Patch, ...] = ()
    replacement: str | None = None  # key in the adapter file
    rows: Rows | None = None
    bias: str | None = None  # the module whose scaling times "bias" slot is added

    @property
    def matrix(self) -> tuple[int, int]:
        """The tensor as rows and columns: experts are stacked, a convolution's kernel lies along its row."""
        rows = prod(self.shape[:-1]) if len(self.shape) == 3 and self.stacked else (self.shape or (1,))[0]
        return rows, prod(self.shape) // rows if rows else 0

    @property
    def stacked(self) -> bool:
        return any(patch.stop - patch.start != self.shape[0] for patch in self.patches)


@dataclass(frozen=True)
class Landing:
    """The sites of an adapter in a base, and what stands in the way."""

    sites: Mapping[str, Site]  # by the tensor's name in the merged checkpoint
    untied: bool  # the merged checkpoint needs tie_word_embeddings = false
    vocab_size: int | None  # when a replaced embedding has another number of rows
    twins: tuple[tuple[str, str], ...]  # keys that ensure_weight_tying says hold the same numbers, perhaps transposed
    problems: tuple[Problem, ...]


# Model families whose tensors lie on disk under other names than in the model (transformers 5's conversion tables).
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))  # Mixtral and MiniMax; GPT-NeoX
_EXPERTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # parameter in the model -> per family, the tensors on disk of one expert, whose rows follow each other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Models whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))

_OUTPUTS = ("lm_head", "embed_out")  # their rows are tokens, also where they are not tied


def sites(layout: Layout, base: Header, base_config: Mapping[str, Any]) -> Landing:
    """Find every tensor that the adapter touches. Problems are returned, not raised: the caller decides."""
    finder = _Finder(layout, base, base_config)
    finder.land()
    return Landing(
        sites={name: finder.sites[name] for name in sorted(finder.sites)},
        untied=finder.untied,
        vocab_size=finder.vocab_size,
        twins=tuple(finder.twins),
        problems=tuple(finder.problems),
    )


class _Place(NamedTuple):
    """A tensor on disk and the rows of the adapter's output that it holds."""

    tensor: str
    out: tuple[int, int | None]
    expert: int


@dataclass
class _Finder:
    layout: Layout
    base: Header
    config: Mapping[str, Any]
    sites: dict[str, Site] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    untied: bool = False
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self.prefixes = sorted({name.partition(".")[0] for name in self.base.tensors})
        self.tie = find_tie(self.base, self.config)

    def problem(self, code: str, message: str, severity: Severity = "error", **details: str) -> None:
        self.problems.append(Problem(code=code, message=message, severity=severity, **details))

    def land(self) -> None:
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method", "unknown method")
            self.problem("QUANTIZED_BASE", f"quantization_config: {method}")
        for target, key in self.layout.replacements.items():
            self._replace(target, key)
        for adapter in self.layout.adapters.values():
            self._patch(adapter)
        for target, rows in self.layout.rows.items():
            self._replace_rows(target, rows)
        self._settle_ties()
        self._check_vocabulary()

    # Names -------------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> list[_Place]:
        """The places of a tensor known by its name in the model; [] when there is none."""
        if places := self._spelled(name):
            return places
        shorter = name.partition(".")[2]
        candidates = [
            p for n in (shorter, *(f"{prefix}.{name}" for prefix in self.prefixes)) if (p := self._spelled(n))
        ]
        if len(candidates) > 1:
            self.problem(
                "AMBIGUOUS_MODULE", "fits several", module=name, got=", ".join(p[0].tensor for p in candidates)
            )
        return candidates[0] if candidates else []

    def _spelled(self, name: str) -> list[_Place]:
        for spelling in (name, *(name.replace(old, new) for old, new in _RENAMED if old in name)):
            if spelling in self.base.tensors or spelling in self.tie.aliases:
                return [_Place(spelling, (0, None), 0)]
            if places := self._experts(spelling):
                return places
        return []

    def _experts(self, name: str) -> list[_Place]:
        """One place per expert and per tensor, for a parameter that is fused in the model only."""
        root, _, parameter = name.rpartition(".")
        for parts in _EXPERTS.get(parameter, ()) if root.endswith(".experts") else ():
            places: list[_Place] = []
            expert = 0
            while all(f"{root}.{expert}.{part}.weight" in self.base.tensors for part in parts):
                start = 0
                for part in parts:
                    tensor = f"{root}.{expert}.{part}.weight"
                    stop = start + self.base.tensors[tensor].shape[0]
                    places.append(_Place(tensor, (start, stop), expert))
                    start = stop
                expert += 1
            if places:
                return places
        return []

    def _missing(self, module: str) -> None:
        known = [name.removesuffix(".weight") for name in self.base.tensors]
        near = get_close_matches(module, known, n=2, cutoff=0.6)
        self.problem(
            "NO_SUCH_MODULE", "not in the base", module=module, got=f"nearest: {', '.join(near)}" if near else ""
        )

    # Replacements and rows ---------------------------------------------------------------------------------------

    def _replace(self, target: str, key: str) -> None:
        shape = self.layout.header.tensors[key].shape
        places = self._find(target)
        if not places:  # a new head: modules_to_save may add what the base lacks
            self.sites[target] = Site(source=None, shape=shape, replacement=key)
            return
        tensor = places[0].tensor
        if tensor in self.sites:
            self.problem("AMBIGUOUS_MODULE", "replaced twice", module=tensor, got=f"again as {target}")
            return
        want = self._stored_shape(tensor)
        if shape != want:
            if not self._resizes(tensor, shape, want):
                self.problem("SHAPE_MISMATCH", "replacement", module=target, wanted=str(want), got=str(shape))
                return
            self.vocab_size = shape[0]
        self.sites[tensor] = Site(source=self._source(tensor), shape=shape, replacement=key)

    def _resizes(self, tensor: str, shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
        """An embedding, its tied output or an output's bias may have another number of tokens."""
        module = tensor.rpartition(".")[0]
        is_vocabulary = tensor == self.tie.embedding or tensor in self.tie.aliases or module.endswith(_OUTPUTS)
        return is_vocabulary and len(shape) == len(want) and shape[1:] == want[1:]

    def _replace_rows(self, target: str, rows: Rows) -> None:
        places = self._find(target)
        if not places:
            self._missing(target.removesuffix(".weight"))
            return
        tensor = places[0].tensor
        site = self.sites.get(tensor) or Site(source=self._source(tensor), shape=self._stored_shape(tensor))
        if site.rows is not None:
            self.problem("AMBIGUOUS_MODULE", "its rows are replaced twice", module=tensor, got=f"again as {target}")
            return
        width = self.layout.header.tensors[rows.key].shape[1:]
        if max(rows.indices) >= site.shape[0] or width != site.shape[1:]:
            want, got = f"rows below {site.shape[0]} of {site.shape[1:]}", f"{max(rows.indices)} of {width}"
            self.problem("SHAPE_MISMATCH", "token rows", module=target, wanted=want, got=got)
            return
        self.sites[tensor] = replace(site, rows=rows)

    # Adapters ----------------------------------------------------------------------------------------------------

    def _patch(self, adapter: AdapterLayout) -> None:
        places = self._find(adapter.module if adapter.stored == "experts" else f"{adapter.module}.weight")
        if not places:
            self._missing(adapter.module)
            return
        held = [place.out[1] - place.out[0] for place in places if place.expert == 0 and place.out[1] is not None]
        if held and (sum(held), places[-1].expert + 1) != (adapter.out_features, adapter.experts):
            want, got = (
                f"{places[-1].expert + 1} experts of {sum(held)}",
                f"{adapter.experts} of {adapter.out_features}",
            )
            self.problem("SHAPE_MISMATCH", "experts", module=adapter.module, wanted=want, got=got)
            return
        for place in places:
            tensor = place.tensor
            site = self.sites.get(tensor) or Site(source=self._source(tensor), shape=self._stored_shape(tensor))
            if patches := self._patches(adapter, place, site.shape):
                if twice := [old.module for old in site.patches if _overlap(old, patches)]:
                    self.problem(
                        "AMBIGUOUS_MODULE", "adapted twice", module=tensor, got=f"{adapter.module}, {twice[0]}"
                    )
                    return
                self.sites[tensor] = replace(site, patches=(*site.patches, *patches))
        if "bias" in adapter.slots:
            self._add_bias(adapter)

    def _patches(self, adapter: AdapterLayout, place: _Place, shape: tuple[int, ...]) -> tuple[Patch, ...]:
        info = self.base.tensors.get(place.tensor)
        if info is not None and info.dtype not in FLOATS:
            self.problem("QUANTIZED_BASE", "not a floating-point tensor", module=place.tensor, got=info.dtype)
            return ()
        out = adapter.out_features if place.out[1] is None else place.out[1] - place.out[0]
        if adapter.stored == "experts" and len(shape) == 3:
            return self._stacked(adapter, shape)
        transposed = self._transposed(adapter, out, shape)
        if transposed is None:
            return ()
        return (Patch(adapter.module, 0, shape[0], transposed, place.out, place.expert),)

    def _stacked(self, adapter: AdapterLayout, shape: tuple[int, ...]) -> tuple[Patch, ...]:
        """All experts in one tensor, (E, out, in) or, in GPT-OSS and Llama 4, (E, in, out)."""
        want = (adapter.experts, adapter.out_features, adapter.in_features)
        swapped = (want[0], want[2], want[1])
        if shape not in (want, swapped):
            self.problem("SHAPE_MISMATCH", "experts", module=adapter.module, wanted=str(shape), got=str(want))
            return ()
        transposed = shape != want
        if want == swapped:
            transposed = self.config.get("model_type") in ("gpt_oss", "llama4", "llama4_text")
        rows = shape[1]
        return tuple(
            Patch(adapter.module, expert * rows, (expert + 1) * rows, transposed, expert=expert)
            for expert in range(adapter.experts)
        )

    def _transposed(self, adapter: AdapterLayout, out: int, shape: tuple[int, ...]) -> bool | None:
        """Whether the base stores this module's weight (in, out). None, and a problem, when it does not fit."""
        inside = adapter.in_features
        if adapter.stored == "embedding":
            if shape == (inside, out):
                return True
        elif adapter.stored == "conv":
            if len(shape) > 2 and (shape[0], prod(shape[1:])) == (out, inside):
                return False
            if len(shape) > 2 and shape[0] == out and inside > prod(shape[1:]) and inside % prod(shape[1:]) == 0:
                self.problem("GROUPED_CONV", "the base convolution is grouped", module=adapter.module, got=str(shape))
                return None
        elif shape == (out, inside) and out != inside:
            return False
        elif shape == (inside, out) and out != inside:
            return True
        elif shape == (out, inside):
            return self._square(adapter.module)
        wanted, got = f"{shape}", f"(out {out}, in {inside})"
        self.problem("SHAPE_MISMATCH", f"stored as {adapter.stored}", module=adapter.module, wanted=wanted, got=got)
        return None

    def _square(self, module: str) -> bool | None:
        """The orientation of a square weight: as its non-square neighbours with a bias, else by the kind of model."""
        evidence = {_orientation(self.base, name) for name in self._neighbours(module)} - {None}
        if len(evidence) == 1:
            return evidence.pop()
        if not evidence and self.config.get("model_type") in _CONV1D_MODELS:
            return True
        if evidence or self.layout.about.transposed:
            self.problem("AMBIGUOUS_ORIENTATION", "(out, in) or (in, out)?", module=module)
            return None
        return False

    def _neighbours(self, module: str) -> Iterator[str]:
        """Weights in the same numbered block; in the whole base when the module is in none."""
        places = self._find(f"{module}.weight")
        block = re.match(r".*?\.?\d+\.", places[0].tensor) if places else None
        return (name for name in self.base.tensors if name.startswith(block[0] if block else ""))

    def _add_bias(self, adapter: AdapterLayout) -> None:
        places = self._find(f"{adapter.module}.bias")
        if not places:
            self.problem(
                "NO_SUCH_MODULE", "lora_bias, but the base module has no bias", module=f"{adapter.module}.bias"
            )
            return
        tensor = places[0].tensor
        site = self.sites.get(tensor) or Site(source=tensor, shape=self._stored_shape(tensor))
        if prod(site.shape) != adapter.out_features:
            want = str(site.shape)
            self.problem("SHAPE_MISMATCH", "bias", module=tensor, wanted=want, got=str(adapter.out_features))
            return
        self.sites[tensor] = replace(site, bias=adapter.module)

    # Ties --------------------------------------------------------------------------------------------------------

    def _source(self, tensor: str) -> str:
        return tensor if tensor in self.base.tensors else self.tie.aliases[tensor]

    def _stored_shape(self, tensor: str) -> tuple[int, ...]:
        return self.base.tensors[self._source(tensor)].shape

    def _settle_ties(self) -> None:
        """Touching one side of a tie breaks it (PEFT's unmerged forward is the oracle); the other side is written out.

        Trained token rows belong to both sides; ensure_weight_tying makes the two sides' adapters one.
        """
        embedding = self.tie.embedding
        if embedding is None:
            return
        if self.layout.about.tied and embedding in self.sites:
            self._tie_twins(embedding)
            return
        shared = self._share_replacement(embedding)
        touched = self.sites.get(embedding)
        if touched is not None and not touched.patches and touched.replacement == shared:
            others = [alias for alias in self.tie.aliases if self._changed(alias, touched)]
            if not others:
                for alias in self.tie.aliases:
                    self.sites.pop(alias, None)
                return
        if touched is None and not any(alias in self.sites for alias in self.tie.aliases):
            return
        if not self.tie.aliases and touched is not None and self.tie.unknown_output:
            self.problem("UNKNOWN_TIE", "which output is tied?", module=embedding)
        if not self.tie.aliases and not self.tie.flagged:
            return
        for alias in self.tie.aliases:  # without the tie each side needs its own tensor
            if alias not in self.sites:
                shape = self.layout.header.tensors[shared].shape if shared else self.base.tensors[embedding].shape
                self.sites[alias] = Site(source=embedding, shape=shape, replacement=shared)
            if touched is not None and self.sites[alias].replacement == touched.replacement:
                self.sites[alias] = replace(self.sites[alias], rows=self.sites[alias].rows or touched.rows)
            self._untie_bias(alias)
        self.untied = bool(self.tie.aliases) or self.tie.flagged
        if touched is not None and touched.patches and embedding.rpartition(".")[0].endswith("shared"):
            self.problem(
                "NEVER_CALLED", "the merged model ignores it as the unmerged one does", "warning", module=embedding
            )

    def _check_vocabulary(self) -> None:
        """A file with the embedding of a resized vocabulary, but not the output's: the new tokens' scores are lost."""
        if self.vocab_size is None or self.tie.embedding is None:
            return
        on_disk = (name for name in self.base.tensors if name.removesuffix(".weight").endswith(_OUTPUTS))
        for name in dict.fromkeys((self.tie.embedding, *on_disk, *(self.sites.keys() & self.tie.aliases.keys()))):
            rows = self.sites[name].shape[0] if name in self.sites else self.base.tensors[name].shape[0]
            if rows != self.vocab_size:
                self.problem(
                    "VOCABULARY_SPLIT", "not resized", module=name, wanted=f"{self.vocab_size} tokens", got=str(rows)
                )

    def _share_replacement(self, embedding: str) -> str | None:
        """A full weight that modules_to_save does not name is loaded into the parameter that both sides share."""
        sides = [side for side in (embedding, *self.tie.aliases) if side in self.sites]
        keys = {key for side in sides if (key := self.sites[side].replacement)}
        saved = self.layout.about.saved_modules
        modules = [side.removesuffix(".weight") for side in sides]
        if len(keys) != 1 or any(f".{module}".endswith(f".{name}") for name in saved for module in modules):
            return None
        (key,) = keys
        shape = self.layout.header.tensors[key].shape
        for side in dict.fromkeys((embedding, *sides)):
            site = self.sites.get(side) or Site(source=embedding, shape=shape)
            self.sites[side] = replace(site, replacement=key, shape=shape)
        return key

    def _changed(self, alias: str, kept: Site) -> bool:
        return alias in self.sites and self.sites[alias] != replace(kept, rows=None)

    def _untie_bias(self, alias: str) -> None:
        """The tie also holds `cls.predictions.decoder.bias` to `cls.predictions.bias`, and the like."""
        decoder = alias.removesuffix(".weight")
        bias, source = f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"
        if source in self.base.tensors and bias not in self.base.tensors and bias not in self.sites:
            shape = self.base.tensors[source].shape
            self.sites[bias] = self.sites.get(source) or Site(source=source, shape=shape)

    def _tie_twins(self, embedding: str) -> None:
        """Keep one side of a tie that training kept: the other side's tensors must be the same numbers, transposed."""
        kept = self.sites[embedding]
        for alias in self.tie.aliases:
            site = self.sites.pop(alias, None)
            if site is None:
                continue
            if bool(kept.patches) != bool(site.patches) or bool(kept.replacement) != bool(site.replacement):
                self.problem("TIE_BROKEN_BY_FILE", "one of two tied sides is not adapted", module=alias)
                continue
            if kept.replacement and site.replacement:
                self.twins.append((kept.replacement, site.replacement))
            if kept.patches:
                first, second = (self.layout.adapters[s.patches[0].module].keys for s in (kept, site))
                self.twins += [(first["A"], second["B"]), (first["B"], second["A"])]


def _overlap(patch: Patch, others: tuple[Patch, ...]) -> bool:
    return any(patch.start < other.stop and other.start < patch.stop for other in others)


def _orientation(base: Header, name: str) -> bool | None:
    """Whether a non-square weight with a bias is stored (in, out); None when it cannot tell."""
    bias = base.tensors.get(f"{name.removesuffix('.weight')}.bias")
    shape = base.tensors[name].shape
    if not name.endswith(".weight") or bias is None or len(shape) != 2 or shape[0] == shape[1]:
        return None
    return {shape[0]: False, shape[1]: True}.get(prod(bias.shape))
