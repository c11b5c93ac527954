"""One cause for a whole file: another adapter than the given one, when its modules say so together."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isnan, sqrt
from typing import NamedTuple

from d2surgery.auditing.findings import ModuleAudit
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.replay import Replay
from d2surgery.auditing.tally import Tally

_VAGUE = (
    "WRONG_STRENGTH",
    "DELTA_UNEXPLAINED",
    "ROUNDING_EXCESS",
    "STRENGTH_UNCERTAIN",
    "WEIGHT_DECAYED",
    "ROW_SCALED",
)
_PLACES = 1 / 16  # of the elements
_MOST = 0.5  # of the modules
_UNLIKE = 0.03  # of delta's norm, which is left beside any strength and rounding
_SOME = 0.2  # of them, where more than a factor is seen
_SCATTER = 9.0  # of strengths, which is 1 by chance
_FAR, _UNALIKE = 0.1, 0.95  # from strength one; cosine of what was merged and the given delta
_LOW = 16  # singular values above rounding, or a quarter of the block's: of low rank


class _Likeness(NamedTuple):
    strength: float  # of the given delta in what was merged
    error: float
    rest: float  # what is not along it, in units of delta, rounding taken off
    cosine: float  # of what was merged and the given delta


def another_adapter(
    modules: Mapping[str, ModuleAudit], pairs: Iterable[TensorPair], replay: Replay
) -> dict[str, ModuleAudit]:
    """Where most modules hold a change that no strength of the given delta explains, and what no adapter touches is
    the base's: an adapter like it, or unlike it. Noise leaves the strength at one, and has full rank."""
    strange = {name: module for name, module in modules.items() if module.code in _VAGUE and not _in_places(module)}
    every = {name: _likeness(module, replay.modules[name]) for name, module in strange.items()}
    vague = {name: like for name, like in every.items() if like is not None}
    low = [name for name in vague if 0 < (modules[name].residual_rank or 0) <= _LOW]
    other = {*low, *(name for name, like in vague.items() if like.rest > _UNLIKE)}
    if (
        len(vague) < max(2.0, _MOST * len(modules))
        or len(other) < _SOME * len(vague)
        or not _base_is_right(pairs, replay)
    ):
        return dict(modules)
    unexplained = [like for name, like in vague.items() if modules[name].code == "DELTA_UNEXPLAINED"]
    leaning = sum(map(_leans, unexplained)) > _MOST * len(vague)
    if _scatter([*vague.values()]) < _SCATTER and len(low) < _MOST * len(vague) and not leaning:
        return dict(modules)
    nearly = {name for name, m in modules.items() if m.verdict == "fail" and "; strength" in m.message}
    said = _said([like.cosine for like in vague.values()])
    return {
        name: replace(m, code="ANOTHER_ADAPTER", status="wrong", verdict="fail", message=said)
        if name in vague or name in nearly
        else m
        for name, m in modules.items()
    }


def _in_places(module: ModuleAudit) -> bool:
    """Whether little differs, and that in known places: an adapter's change is everywhere."""
    named = module.code in ("ROW_SCALED", "DELTA_UNEXPLAINED") and module.residual_rank is None
    return named and module.mismatched_elements <= _PLACES * module.elements


def _likeness(module: ModuleAudit, tally: Tally) -> _Likeness | None:
    sums, delta = tally.comparison, tally.survival.delta_squared
    if not delta or not sums.e_delta or isnan(sums.strength):
        return None
    strength, error = module.strength, module.strength_error
    x = strength - 1
    right = max(tally.survival.error_squared - 2 * (sums.de - sums.d_delta) - sums.dd, 0.0)  # what rounding leaves
    mine = tally.survival.error_squared - 2 * x * (tally.survival.inner - delta) + x * x * delta
    left = max(mine - right, 0.0) / delta
    size = sqrt(strength * strength + left)
    return _Likeness(strength, error, sqrt(left), strength / size if size else 0.0)


def _scatter(likes: list[_Likeness]) -> float:
    """The mean of ((λ̂ − mean)/error)² over modules: 1 where they share one strength."""
    weights = [1 / max(like.error, 1e-9) ** 2 for like in likes]
    mean = sum(w * like.strength for w, like in zip(weights, likes, strict=True)) / sum(weights)
    return sum(w * (like.strength - mean) ** 2 for w, like in zip(weights, likes, strict=True)) / len(likes)


def _leans(like: _Likeness) -> bool:
    """Whether it has another strength than one, and much beside it: noise would leave the strength."""
    return abs(like.strength - 1) > max(_FAR, 5 * like.error) and like.cosine < _UNALIKE


def _base_is_right(pairs: Iterable[TensorPair], replay: Replay) -> bool:
    plain = [pair for pair in pairs if pair.status == "unchanged"]
    changed = [pair for pair in plain if replay.tensors[pair.name].mismatched]
    return len(changed) <= _MOST * len(plain)


def _said(cosines: list[float]) -> str:
    """The cosine over modules, with the error of its mean."""
    mean = sum(cosines) / len(cosines)
    error = sqrt(sum((c - mean) ** 2 for c in cosines) / max(len(cosines) - 1, 1) / len(cosines))
    how = "similar to the given one" if mean > max(0.1, 3 * error) else "unlike the given one"
    if mean < -max(0.1, 3 * error):
        how = "opposite to the given one"
    each = f"{min(cosines):.2f} to {max(cosines):.2f} in single modules"
    return f"the change in {len(cosines)} modules is {how}: cosine {mean:.3f} ± {error:.1g} ({each})"
