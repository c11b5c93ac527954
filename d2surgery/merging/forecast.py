"""How much of each delta will survive being rounded, measured before anything is written."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from math import isnan

from d2surgery.errors import Problem
from d2surgery.files.tensors import DTYPES
from d2surgery.formats.layout import AdapterLayout
from d2surgery.kinds import TABLE
from d2surgery.measures.fidelity import LOW_GAIN, Survival, survival
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.tiles import AdaptedTile, Steps
from d2surgery.surveying.zeros import problems_of_zeros

SHORT = {"BF16": "bf16", "F16": "fp16"}  # the dtypes that lose something, as people write them
_SAMPLE = 8  # modules of which merge looks at some rows: a hundredth of its time
_ENTRIES = 1 << 16  # about as many of each


def forecast(
    prepared: Prepared, threads: int, dtypes: tuple[str, ...], progress: Callable[[int, int], None]
) -> dict[str, dict[str, Survival]]:
    """Per module and output dtype, from the deltas themselves."""
    merger = prepared.merger
    adapted = [output for output in prepared.outputs if output.site and output.site.patches]
    total = sum(output.entry.nbytes for output in adapted)

    def measure(steps: Steps) -> dict[tuple[str, str], Survival]:
        sums: defaultdict[tuple[str, str], Survival] = defaultdict(Survival)
        for tile, stored in steps:
            if isinstance(tile, AdaptedTile):
                base_weight = merger.base_weight(tile, stored)
                delta = merger.delta(tile, base_weight)
                for dtype in dtypes:
                    sums[tile.patch.module, dtype] += survival(base_weight, delta, DTYPES[dtype])
        return sums

    found: dict[str, dict[str, Survival]] = {}
    for sums in merger.over([(o, measure) for o in adapted], threads, lambda done: progress(done, total)):
        for (module, dtype), part in sums.items():
            of_module = found.setdefault(module, dict.fromkeys(dtypes, Survival()))
            of_module[dtype] += part
    return found


def sampled(prepared: Prepared) -> dict[str, dict[str, Survival]]:
    """As `forecast`, of some rows of a few modules, evenly spaced, whose output loses precision by its dtype."""
    outputs = [o for o in prepared.outputs if o.dtype in SHORT and o.site and o.site.patches]
    found: dict[str, dict[str, Survival]] = {}
    for output in outputs[:: max(-(-len(outputs) // _SAMPLE), 1)]:
        tile = prepared.merger.first_rows(output, _ENTRIES)
        if tile is not None:
            base_weight = prepared.merger.base_weight(tile, prepared.merger.read(tile))
            delta = prepared.merger.delta(tile, base_weight)
            found[tile.patch.module] = {d: survival(base_weight, delta, DTYPES[d]) for d in SHORT}
    return found


def low_survival(prepared: Prepared, found: Mapping[str, Mapping[str, Survival]]) -> Iterator[Problem]:
    """A warning where rounding to the output's dtype loses part of the deltas: how much, where, which dtype helps."""
    dtype = prepared.dtype or prepared.fit.base.header.usual_dtype or "F32"
    totals = {d: sum((by[d] for by in found.values() if d in by), Survival()) for d in SHORT}
    gain = totals[dtype].gain if dtype in SHORT else 1.0
    if isnan(gain) or gain >= LOW_GAIN:
        return
    every = len(prepared.fit.layout.adapters)
    where = f"; measured on rows of {len(found)} of {every} modules" if len(found) < every else ""
    other = next(d for d in SHORT if d != dtype)
    helps = f"--dtype {SHORT[other]} keeps {totals[other].gain:.1%}, " if totals[other].gain >= LOW_GAIN else ""
    worst = sorted((by[dtype].gain, module) for module, by in found.items() if by[dtype].delta_squared)[:3]
    yield Problem(
        code="LOW_SURVIVAL",
        severity="warning",
        message=f"{1 - gain:.0%} of the delta is lost in {SHORT[dtype]}; {helps}--dtype fp32 all of it{where}",
        module=", ".join(f"{module} ({low:.2g} kept)" for low, module in worst),
    )


def zero_updates(prepared: Prepared, zero: Collection[str]) -> Iterator[Problem]:
    """Which modules' updates are zero, by the keys whose numbers all are."""
    layout = prepared.fit.layout
    return problems_of_zeros(layout, [m for m, entry in layout.adapters.items() if _gives_nothing(entry, zero)])


def _gives_nothing(entry: AdapterLayout, zero: Collection[str]) -> bool:
    """One factor of every group is zero; of Dual LoRA the first group's, which the other only gives its signs."""
    row, slots = TABLE[entry.kind], entry.slots
    groups = [*row.groups.values()] if row.bounded else [*row.groups.values()][:1]
    halves = ((slots[group.down], slots[group.up]) for group in groups)
    bias = "bias" in slots and slots["bias"].key not in zero
    return not bias and all(any(half.key in zero for half in pair) for pair in halves)
