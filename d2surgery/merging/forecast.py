"""How much of each delta will survive being rounded, measured before anything is written."""

from collections import defaultdict
from collections.abc import Callable

from d2surgery.files.tensors import DTYPES
from d2surgery.measures.fidelity import Survival, survival
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.tiles import AdaptedTile, Steps


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
