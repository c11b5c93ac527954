"""A second look at modules that no recipe replays: is what differs rounding, or has it structure and a name?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

import torch

from d2surgery.adapters import DoRA
from d2surgery.auditing.blocks import Block, block_of
from d2surgery.auditing.findings import ModuleAudit
from d2surgery.auditing.judgement import NOISY, noise
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.replay import Replay
from d2surgery.auditing.strays import Marks
from d2surgery.auditing.structure import Structure, is_of_strength, low_rank, structure_of, tests_of
from d2surgery.auditing.tally import Tally
from d2surgery.machine import trim
from d2surgery.merging.prepared import Prepared
from d2surgery.placement.site import Patch

_OPEN = ("OTHER_ROUNDING", "ROUNDING_EXCESS", "STRENGTH_UNCERTAIN")  # passed, or nearly, unless there is structure
_VAGUE = (*_OPEN, "DELTA_UNEXPLAINED", "WRONG_STRENGTH")  # what a structure may explain better
_FEW, _SOME = 12, 4  # wrong modules of one code: so few are all looked at for a better name, of more first some
_AT_ONCE = 16  # modules of which marks are held
_RANK = 0.01  # share of differing elements from which a change of low rank can be seen among them


def with_structure(
    prepared: Prepared, replay: Replay, pairs: Sequence[TensorPair], modules: Mapping[str, ModuleAudit]
) -> dict[str, ModuleAudit]:
    """Modules whose differences are not random in place and size, by the name of what they are."""
    again = [name for name in modules if _looked_at(modules[name], replay.modules[name])]
    wrong: dict[str, list[str]] = {}
    for name in again:
        if modules[name].verdict == "fail":
            wrong.setdefault(modules[name].code, []).append(name)
    later = [names[_SOME:] if len(names) > _FEW else [] for names in wrong.values()]
    left = {name for names in later for name in names}
    found = _looked_into(prepared, replay, pairs, modules, [name for name in again if name not in left])
    rest = [
        name
        for names, others in zip(wrong.values(), later, strict=True)
        if sum(_better(found[name], modules[name]) for name in names[:_SOME]) > _SOME / 2
        for name in others
    ]
    return _looked_into(prepared, replay, pairs, found, rest)


def _better(found: ModuleAudit, before: ModuleAudit) -> bool:
    """Whether another look found a cause, or places that make a rank meaningless."""
    return (found.code, found.residual_rank) != (before.code, before.residual_rank)


def _looked_into(
    prepared: Prepared,
    replay: Replay,
    pairs: Sequence[TensorPair],
    modules: Mapping[str, ModuleAudit],
    names: Sequence[str],
) -> dict[str, ModuleAudit]:
    found, tests = dict(modules), _tests(pairs)
    for name, marks in _marked(replay, pairs, names):
        structure = _of_module(prepared, pairs, replay.modules[name], modules[name], marks, tests)
        if structure is not None:
            found[name] = _renamed(modules[name], structure)
        elif _is_noise(modules[name], replay.modules[name]):
            message = f"{noise_of(replay.modules[name]):.1f} times the noise of rounding once, random in place and size"
            found[name] = replace(
                modules[name], status="rounding", verdict="pass", code="ROUNDING_EXCESS", message=message
            )
    return found


def _looked_at(module: ModuleAudit, tally: Tally) -> bool:
    sums = tally.comparison
    return module.code in _VAGUE and tally.finite and sums.mismatched > sums.halfway


def _tests(pairs: Sequence[TensorPair]) -> int:
    """In the whole audit, whether they are made or not."""
    return sum(tests_of(*pair.output.matrix) for pair in pairs if pair.output.site and pair.output.site.patches)


def _marked(
    replay: Replay, pairs: Sequence[TensorPair], names: Sequence[str]
) -> Iterator[tuple[str, dict[tuple[str, Patch], Marks]]]:
    """The modules' marks, from a second pass beside the nearest recipe of each."""
    by_recipe: dict[str, list[str]] = {}
    for name in names:
        nearest = replay.modules[name].nearest
        assert nearest is not None
        by_recipe.setdefault(nearest.name, []).append(name)
    patched = [p for p in pairs if p.status != "tied" and p.output.site and p.output.site.patches]
    for recipe, group in by_recipe.items():
        for some in _apart(patched, group):
            second = Replay(replay.merger, frozenset((recipe,)), before=replay.modules)
            second.run([p for p in patched if some & {*p.modules}], lambda done, total: None)
            yield from ((name, second.modules[name].marks) for name in group if name in some)
            trim()


def _apart(pairs: Sequence[TensorPair], names: Sequence[str]) -> Iterator[set[str]]:
    """A few modules at a time, for their marks are as long as their sides; those that share a tensor together."""
    left = dict.fromkeys(names)
    while left:
        some, grown = set[str](), {*list(left)[:_AT_ONCE]}
        while grown - some:
            some |= grown
            grown = {m for p in pairs if some & {*p.modules} for m in p.modules if m in left}
        yield some
        left = {name: None for name in left if name not in some}


def _of_module(
    prepared: Prepared, pairs: Sequence[TensorPair], tally: Tally, module: ModuleAudit,
    marks: Mapping[tuple[str, Patch], Marks], tests: int,
) -> Structure | None:  # fmt: skip
    gain = _gain_of(tally, module)
    for (tensor, patch), of_patch in marks.items():
        structure = structure_of(of_patch, tests, gain)
        if structure is not None:
            pair = next(pair for pair in pairs if pair.name == tensor)
            return _magnitudes(prepared, pair, patch, tally, structure)
    if (
        (module.code in _OPEN or _is_noise(module, tally))
        and module.mismatched_elements > _RANK * module.elements
        and tally.first is not None
        and not any(is_of_strength(each, tests) for each in marks.values())
    ):
        block = block_of(prepared, tally)
        case, merged = block.case(), block.merged()
        if merged.itemsize <= 2 and low_rank(case.right, case.delta, merged):
            return Structure("DELTA_UNEXPLAINED", "a change of low rank, within rounding of each element")
    return None


def _is_noise(module: ModuleAudit, tally: Tally) -> bool:
    """What nothing explains, of full rank and no more than a few roundings make, at the right strength."""
    right = abs(module.strength - 1) <= max(0.004, 5 * module.strength_error)
    return (
        module.code == "DELTA_UNEXPLAINED"
        and (module.residual_rank or 0) > 0
        and right
        and not tally.comparison.beyond
        and noise_of(tally) <= NOISY
    )


def noise_of(tally: Tally) -> float:
    """See `noise`."""
    return noise(tally.comparison, tally.survival)


def _gain_of(tally: Tally, module: ModuleAudit) -> float:
    """How far a recipe's own rounding of magnitudes and norms may scale a row."""
    mode, nearest = (tally.nearest.mode if tally.nearest else None), module.recipe
    kept = nearest == "torchtune" or bool(getattr(mode, "kept", False) or getattr(mode, "autocast", None))
    coarse = tally.grid or tally.first[0].dtype if tally.first else torch.float32
    return 2 * torch.finfo(coarse).eps if module.kind == "dora" and kept else 0.0


def _renamed(module: ModuleAudit, structure: Structure) -> ModuleAudit:
    strength = f"; {module.message.rpartition('; ')[2]}" if "; strength" in module.message else ""
    message = f"{structure.what}{strength}"
    rank = None if structure.places else module.residual_rank  # which says nothing of what lies in a few places
    return replace(module, status="wrong", verdict="fail", code=structure.code, message=message, residual_rank=rank)


# DoRA's magnitudes -----------------------------------------------------------------------------------------------


def _magnitudes(prepared: Prepared, pair: TensorPair, patch: Patch, tally: Tally, structure: Structure) -> Structure:
    """Rows that are scaled as if their magnitude were another's, the base's norm, or left out."""
    adapter = prepared.merger.adapter(patch)
    if structure.code != "ROW_SCALED" or structure.axis != "row" or not isinstance(adapter, DoRA) or patch.transposed:
        return structure
    whole = slice(0, pair.output.matrix[1])
    magnitude = adapter.magnitude.double()
    changed = list(zip(structure.places, structure.factors, strict=True))[:64]
    off: dict[str, list[float]] = {}
    for row, factor in changed:
        rows = slice(patch.start + row, patch.start + row + 1)
        base = Block(prepared, pair, patch, rows, whole, tally.held).case().base.double()
        held = adapter.take(out=slice(row, row + 1))
        assert isinstance(held, DoRA)
        norm = float((base + held.scaling * held.B.double() @ held.A.double()).norm())
        own, others = float(magnitude[row]), [float(magnitude[other]) for other, _ in changed if other != row]
        ways = {
            "left out": abs(norm / own - factor),
            "the base's norms": abs(float(base.norm()) / own - factor),
            "those of other rows": min((abs(other / own - factor) for other in others), default=inf),
        }
        for way, error in ways.items():
            off.setdefault(way, []).append(error / max(1e-3, 0.2 * abs(factor - 1)))
    way = min(off, key=lambda way: max(off[way]), default="")
    if not way or max(off[way]) >= 1:  # in one way for all of them
        return structure
    return structure._replace(code="MAGNITUDE_LOST", what=f"magnitudes are {way}: {structure.what}")
