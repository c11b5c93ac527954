"""Untying: what becomes of a tied output when an adapter touches the input embedding, or the other way round."""

from dataclasses import dataclass, field, replace

from d2surgery.errors import Problems
from d2surgery.files.header import Header
from d2surgery.formats.layout import Layout
from d2surgery.placement.site import OUTPUTS, Site
from d2surgery.placement.ties import Tie


@dataclass
class Settlement:
    """The sites once the ties are settled."""

    layout: Layout
    base: Header
    tie: Tie
    sites: dict[str, Site]
    say: Problems
    twins: list[tuple[str, str]] = field(default_factory=list)
    untied: bool = False

    def settle(self) -> None:
        """Touching one side of a tie breaks it (PEFT's unmerged forward is the oracle); the other side is written out.

        Trained token rows belong to both sides; ensure_weight_tying makes the two sides' adapters one.
        """
        embedding = self.tie.embedding
        if embedding is None:
            return
        if self.layout.about.tied and embedding in self.sites:
            self._tie_twins(embedding)
            return
        self._share_replacement(embedding)
        touched = self.sites.get(embedding)
        if touched is not None and self._keeps_tie(embedding, touched):
            for alias in self.tie.aliases:
                self.sites.pop(alias, None)
            return
        if touched is None and not any(alias in self.sites for alias in self.tie.aliases):
            return
        if not self.tie.aliases and touched is not None and self.tie.unknown_output:
            self.say("UNKNOWN_TIE", "which output is tied?", module=embedding)
        if not self.tie.aliases and not self.tie.flagged:
            return
        for alias in self.tie.aliases:  # without the tie each side needs its own tensor
            if alias not in self.sites:
                self.sites[alias] = Site(source=embedding, shape=self.base.tensors[embedding].shape)
            if touched is not None and self.sites[alias].replacement == touched.replacement:
                self.sites[alias] = replace(self.sites[alias], rows=self.sites[alias].rows or touched.rows)
            self._untie_bias(alias)
        self.untied = bool(self.tie.aliases) or self.tie.flagged
        if touched is not None and touched.patches and embedding.rpartition(".")[0].endswith("shared"):
            self.say(
                "NEVER_CALLED", "the merged model ignores it as the unmerged one does", "warning", module=embedding
            )

    def _share_replacement(self, embedding: str) -> None:
        """A full weight that modules_to_save does not name is loaded into the parameter that the other sides share.

        A side that it names, by itself or by what holds it, has a copy of its own and stays out.
        """
        sharing = [side for side in (embedding, *self.tie.aliases) if not self._is_saved(side)]
        keys = {key for side in sharing if (site := self.sites.get(side)) and (key := site.replacement)}
        if len(keys) != 1:
            return
        (key,) = keys
        shape = self.layout.header.tensors[key].shape
        for side in sharing:
            site = self.sites.get(side) or Site(source=embedding, shape=shape)
            self.sites[side] = replace(site, replacement=key, shape=shape)

    def _is_saved(self, side: str) -> bool:
        """By the name that the adapter has for it, where it has one: the base's file may lack the model's prefix."""
        site = self.sites.get(side)
        names = [target for target, key in self.layout.replacements.items() if site and key == site.replacement]
        return any(self.layout.about.saves(name) for name in names or [side])

    def _keeps_tie(self, embedding: str, touched: Site) -> bool:
        """Whether one tensor still does for all sides: loaded into what they share, or with rows trained for all."""
        others = [self.sites.get(alias) for alias in self.tie.aliases]
        if touched.replacement is None:
            shared = all(site in (None, replace(touched, rows=None)) for site in others)
        else:
            shared = not self._is_saved(embedding) and all(site == replace(touched, rows=None) for site in others)
        return shared and not touched.patches

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
                self.say("TIE_BROKEN_BY_FILE", "one of two tied sides is not adapted", module=alias)
                continue
            if kept.replacement and site.replacement:
                self.twins.append((kept.replacement, site.replacement))
            if kept.patches:
                first, second = (self.layout.adapters[s.patches[0].module].keys for s in (kept, site))
                self.twins += [(first["A"], second["B"]), (first["B"], second["A"])]

    def check_vocabulary(self, size: int | None) -> None:
        """A file with the embedding of a resized vocabulary, but not the output's: the new tokens' scores are lost."""
        if size is None or self.tie.embedding is None:
            return
        on_disk = (name for name in self.base.tensors if name.removesuffix(".weight").endswith(OUTPUTS))
        for name in dict.fromkeys((self.tie.embedding, *on_disk, *(self.sites.keys() & self.tie.aliases.keys()))):
            rows = self.sites[name].shape[0] if name in self.sites else self.base.tensors[name].shape[0]
            if rows != size:
                self.say("VOCABULARY_SPLIT", "not resized", module=name, wanted=f"{size} tokens", got=str(rows))
