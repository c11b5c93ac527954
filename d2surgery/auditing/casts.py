"""Whether a base was cast to 16 bits when it was loaded: then what no adapter touches is rounded, too."""

from collections.abc import Mapping, Sequence

import torch

from d2surgery.auditing.findings import ModuleAudit
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.recipes import bank
from d2surgery.auditing.replay import Replay
from d2surgery.auditing.tally import LOW


def cast_before(replay: Replay, pairs: Sequence[TensorPair], modules: Mapping[str, ModuleAudit]) -> bool:
    """Every tensor that no adapter touches is as such a cast leaves it, and the modules were merged after it."""
    plain = [pair for pair in pairs if pair.status == "unchanged" and pair.dtype.is_floating_point]
    if not any(replay.tensors[pair.name].mismatched for pair in plain):
        return False
    through = frozenset(LOW).intersection(*(replay.tensors[pair.name].through for pair in plain))
    right = {name for name, module in modules.items() if module.verdict == "pass"}
    loads = {replay.modules[name].load for name in right}
    merged = [pair for pair in pairs if pair.status == "adapted" and right.issuperset(pair.modules)]
    return bool(through) and (not merged or bool(through & loads) or _also(replay, merged, through))


def _also(replay: Replay, merged: Sequence[TensorPair], through: frozenset[torch.dtype]) -> bool:
    """Whether the smallest merged tensor is as well a merge onto the cast base: small ones fit several recipes."""
    pair = min(merged, key=lambda pair: pair.info.nbytes)
    names = set()
    for module in pair.modules:
        stored, file = pair.output.stored_dtype, replay.modules[module].grid or pair.dtype
        entry = replay.merger.checkpoint.layout.adapters[module]
        names |= {r.name for r in bank(entry.kind, entry.axis, stored, file) if r.load(stored, file) in through}
    again = Replay(replay.merger, frozenset(names))
    again.run([pair], lambda done, total: None)
    return not again.tensors[pair.name].mismatched
