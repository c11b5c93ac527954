"""From the sums of quantised tensors to verdicts.

What is shown false fails; the same blocks as a recipe gives, quantised, pass; what is only consistent with a right
merge is inconclusive, since no bits can be checked there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan, prod, sqrt
from typing import Any, NamedTuple

from d2surgery.auditing.diagnosis import SIGNIFICANT
from d2surgery.auditing.findings import ModuleAudit, TensorAudit, Thresholds, several
from d2surgery.auditing.grids import FEW, OnGrids, Sums, grid_of
from d2surgery.auditing.judgement import COARSE
from d2surgery.auditing.pairing import TensorPair
from d2surgery.errors import Problem
from d2surgery.measures.fidelity import LOW_GAIN

NOISY = 1.5  # times the noise that the stored scales allow: no quantiser known here makes more (MXFP4: 1.34)
FAR = 3.0  # the same of some rows
OFF = 0.05  # of a strength where the quantiser is not known: ggml's lean by up to 0.03 from 3 bits on
_USUAL = {2: "DELTA_APPLIED_TWICE", -1: "SIGN_FLIPPED", 0: "DELTA_NOT_APPLIED"}


class Judged(NamedTuple):
    """Quantised modules and tensors, and what is said of all of them."""

    modules: dict[str, ModuleAudit]
    tensors: dict[str, TensorAudit]
    problems: list[Problem]


def judged(found: OnGrids, pairs: Sequence[TensorPair], kinds: Mapping[str, str], limits: Thresholds) -> Judged:
    """kinds: of adapters, by module."""
    held: dict[str, list[TensorPair]] = {}
    for pair in pairs:
        for module in pair.modules if pair.status != "tied" else ():
            held.setdefault(module, []).append(pair)
    modules = {
        name: _module(name, kinds[name], held[name], sums, found, limits) for name, sums in found.modules.items()
    }
    modules = _pooled(modules, found, limits)
    tensors = {pair.name: _tensor(pair, found.tensors[pair.name], modules) for pair in pairs}
    plain = [
        name for name, tensor in tensors.items() if tensor.status in ("unchanged", "changed") and not tensor.modules
    ]
    if 2 * sum(tensors[name].code == "TENSOR_CHANGED" for name in plain) > len(plain):
        modules = {
            name: replace(m, code="WRONG_BASE") if m.code == "DELTA_UNEXPLAINED" else m for name, m in modules.items()
        }
    return Judged(modules, tensors, [*_within(found, pairs, tensors), *_same_blocks(modules, found)])


def _module(
    module: str, kind: str, held: Sequence[TensorPair], sums: Sums, found: OnGrids, limits: Thresholds
) -> ModuleAudit:
    how = found.hows.get(kind)
    code, message = _wrong(sums, limits)
    status, verdict = "wrong", "fail"
    if not code and sums.replayed:
        status, verdict = "replayed", "pass"
    elif not code and _only_rounding(sums, limits):
        status, verdict, code, message = "rounding", "pass", "OTHER_ROUNDING", _strength(sums)
    elif not code:
        status, verdict, code, message = "uncertain", "inconclusive", "ON_A_GRID", _strength(sums)
    return ModuleAudit(
        module=module,
        kind=kind,
        status=status,  # type: ignore[arg-type]
        verdict=verdict,  # type: ignore[arg-type]
        tensors=tuple(pair.name for pair in held),
        elements=sums.survival.elements,
        mismatched_elements=sums.wanted.mismatched,
        recipe=how.recipe.name if how and sums.known else None,
        strength=sums.wanted.strength,
        strength_error=sums.wanted.strength_error,
        residual=sums.wanted.residual,
        survival=sums.survival,
        code=code,
        message=message,
        grid=grid_of(held[0]).name,
        grid_noise=sums.noise,
    )


def _wrong(sums: Sums, limits: Thresholds, *, together: bool = False) -> tuple[str, str]:
    """What is shown false; ("", "") where nothing is. together: of more than one module."""
    if not sums.finite:
        return "NOT_FINITE", "the merged weight holds NaN or infinity"
    if sums.replayed:
        return "", ""
    if sums.known and sums.is_base:
        return "DELTA_NOT_APPLIED", "the same blocks as the base quantised"
    if sums.excess > NOISY:
        return "DELTA_UNEXPLAINED", f"{sums.excess:.1f} times the noise of the grid is left; {_strength(sums)}"
    named = _off(sums, limits, together)
    if not named and sums.worst > FAR:
        return "DELTA_UNEXPLAINED", f"some rows are off by {sums.worst:.1f} times the noise of the grid"
    return (named, _strength(sums)) if named else ("", "")


def _off(sums: Sums, limits: Thresholds, together: bool) -> str:
    """The code of a strength that cannot be that of a right merge.

    A quantiser that is not known may lean: for scales that are chosen by least squares n is −‖n‖²/‖W‖² of W′ and more.
    """
    strength, error = sums.wanted.strength, sums.wanted.strength_error
    near = SIGNIFICANT * error
    likewise = sums.known and sums.wanted.mismatched <= FEW * sums.wanted.elements  # else perhaps with an imatrix
    leans = 0.0 if likewise else max(OFF, sums.floor / max(sums.size, 1e-300))
    least = max(near, limits.strength_fail, leans)
    if isnan(strength) or sums.least - least <= strength <= 1 + least:
        return ""
    usual = next((code for factor, code in _USUAL.items() if abs(strength - factor) <= max(near, OFF)), "")
    if sums.attenuated and (0 < strength < 1.5 if not usual else usual == "DELTA_NOT_APPLIED" and not together):
        return ""  # as a right merge may be, in one module
    return usual or "WRONG_STRENGTH"


def _only_rounding(sums: Sums, limits: Thresholds) -> bool:
    """Whether a few numbers lie on the neighbouring step, as sums in another order leave them."""
    few = sums.known and sums.wanted.mismatched <= FEW * sums.wanted.elements and not sums.beyond and not limits.exact
    off, error = abs(sums.wanted.strength - 1), sums.wanted.strength_error
    return few and off <= limits.strength_pass and SIGNIFICANT * error <= COARSE


def _pooled(modules: dict[str, ModuleAudit], found: OnGrids, limits: Thresholds) -> dict[str, ModuleAudit]:
    """One merger treats all alike: what no module shows by itself, all of them on one grid may together."""
    grids: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.code == "ON_A_GRID":
            grids.setdefault(module.grid, []).append(name)
    settled = dict(modules)
    for grid, alike in grids.items():
        sums = sum((found.modules[name] for name in alike), Sums())
        code, message = _wrong(sums, limits, together=len(alike) > 1)
        told = f"{grid}, {len(alike)} modules together: {message or _strength(sums)}"
        changed: dict[str, Any] = {"message": f"{told}; {_left_open(sums)}"}
        if code:
            changed = {"status": "wrong", "verdict": "fail", "code": code, "message": told}
        settled |= {name: replace(modules[name], **changed) for name in alike}
    return settled


def _left_open(sums: Sums) -> str:
    strength, error = sums.wanted.strength, sums.wanted.strength_error
    if isnan(strength) or SIGNIFICANT * error >= 1:
        return "too coarse to tell the adapter from none"
    if sums.least < LOW_GAIN:
        return "rounding to 16 bits before loses part of it, too"
    if sums.attenuated and strength < LOW_GAIN:
        return "the base lies on a coarse grid already, where a right merge may lose as much"
    return "as a right merge, whose bits cannot be checked on this grid"


def _strength(sums: Sums) -> str:
    """The numbers of a grid: strength, correlation, noise."""
    s = sums.survival
    if not s.delta_squared:
        return "the delta is zero"
    usual = 1 / sqrt(1 + sums.noise**2)
    return (
        f"strength {sums.wanted.strength:.4g} ± {sums.wanted.strength_error:.1g}, correlation {s.cosine:.2g} "
        f"(a right merge's: about {usual:.2g}), the grid's noise is {sums.noise:.2g} times the delta"
    )


def _tensor(pair: TensorPair, sums: Sums, modules: Mapping[str, ModuleAudit]) -> TensorAudit:
    wrong = [modules[name].code for name in pair.modules if name in modules and modules[name].verdict == "fail"]
    code = wrong[0] if wrong and pair.status != "tied" else ""
    if not sums.finite:
        code = code or "NOT_FINITE"
    elif not pair.modules or pair.status == "tied":
        far = not sums.replayed and (sums.excess > NOISY or sums.worst > FAR)
        code = "TENSOR_CHANGED" if far else ""
    return TensorAudit(
        name=pair.name,
        status="changed" if code else pair.status,
        dtype=grid_of(pair).name,
        shape=pair.output.shape,
        elements=prod(pair.output.shape),
        mismatched_elements=sums.wanted.mismatched if sums.known else 0,
        modules=pair.modules,
        code=code,
    )


def _within(found: OnGrids, pairs: Sequence[TensorPair], tensors: Mapping[str, TensorAudit]) -> list[Problem]:
    """Tensors that no adapter touches, and that no bits show to be the base's."""
    plain = [p.name for p in pairs if (not p.modules or p.status == "tied") and not tensors[p.name].code]
    open_ = [name for name in plain if not found.tensors[name].replayed]
    if not open_:
        return []
    message = "no adapter touches them, and they are the base's within the noise of their grid: bits cannot be checked"
    return [Problem(code="ON_A_GRID", severity="warning", message=message, module=several(open_))]


def _same_blocks(modules: Mapping[str, ModuleAudit], found: OnGrids) -> list[Problem]:
    """How what replays was made, and how much of the delta it holds."""
    names = [name for name, module in modules.items() if module.status == "replayed"]
    if not names:
        return []
    sums = sum((found.modules[name] for name in names), Sums())
    grids = ", ".join(sorted({modules[name].grid for name in names}))
    how = ", ".join(sorted({found.hows[modules[name].kind].words for name in names}))
    gain, error = sums.held.strength, sums.held.strength_error
    told = [Problem(code="SAME_BLOCKS", severity="info", message=f"{how}, then {grids}: the same blocks",
                    module=several(names))]  # fmt: skip
    if gain + SIGNIFICANT * error < LOW_GAIN:
        message = f"of the delta the grid keeps {gain:.2g} ± {error:.1g}: the base lies on it, or near it"
        told.append(Problem(code="LOW_SURVIVAL", severity="warning", message=message, module=several(names)))
    return told
