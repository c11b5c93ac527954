"""Names: where a tensor known by its name in the model lies in the base's files."""

from difflib import get_close_matches
from typing import NamedTuple

from d2surgery.errors import Problems
from d2surgery.files.header import Header
from d2surgery.placement.ties import Tie

# Model families whose tensors lie on disk under other names than in the model (transformers 5's conversion tables).
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))  # Mixtral and MiniMax; GPT-NeoX
_EXPERTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # parameter in the model -> per family, the tensors on disk of one expert, whose rows follow each other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class Place(NamedTuple):
    """A tensor on disk and the rows of the adapter's output that it holds."""

    tensor: str
    out: tuple[int, int | None]
    expert: int


class Names:
    """A base's tensors by the names that the model has for them."""

    def __init__(self, base: Header, tie: Tie, say: Problems) -> None:
        self.base, self.tie, self.say = base, tie, say
        self.prefixes = sorted({name.partition(".")[0] for name in base.tensors})

    def find(self, name: str) -> list[Place]:
        """The places of a tensor known by its name in the model; [] when there is none."""
        if places := self._spelled(name):
            return places
        shorter = name.partition(".")[2]
        candidates = [
            p for n in (shorter, *(f"{prefix}.{name}" for prefix in self.prefixes)) if (p := self._spelled(n))
        ]
        if len(candidates) > 1:
            self.say("AMBIGUOUS_MODULE", "fits several", module=name, got=", ".join(p[0].tensor for p in candidates))
        return candidates[0] if candidates else []

    def _spelled(self, name: str) -> list[Place]:
        for spelling in (name, *(name.replace(old, new) for old, new in _RENAMED if old in name)):
            if spelling in self.base.tensors or spelling in self.tie.aliases:
                return [Place(spelling, (0, None), 0)]
            if places := self._experts(spelling):
                return places
        return []

    def _experts(self, name: str) -> list[Place]:
        """One place per expert and per tensor, for a parameter that is fused in the model only."""
        root, _, parameter = name.rpartition(".")
        for parts in _EXPERTS.get(parameter, ()) if root.endswith(".experts") else ():
            places: list[Place] = []
            expert = 0
            while all(f"{root}.{expert}.{part}.weight" in self.base.tensors for part in parts):
                start = 0
                for part in parts:
                    tensor = f"{root}.{expert}.{part}.weight"
                    stop = start + self.base.tensors[tensor].shape[0]
                    places.append(Place(tensor, (start, stop), expert))
                    start = stop
                expert += 1
            if places:
                return places
        return []

    def missing(self, module: str) -> None:
        """Say that there is no such module, and what is named nearly so."""
        known = [name.removesuffix(".weight") for name in self.base.tensors]
        near = get_close_matches(module, known, n=2, cutoff=0.6)
        self.say("NO_SUCH_MODULE", "not in the base", module=module, got=f"nearest: {', '.join(near)}" if near else "")
