"""From sums and diagnoses to verdicts: the rules of an audit, without reading anything."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import isnan, prod, sqrt
from typing import NamedTuple

from d2surgery.auditing.diagnosis import EXCESS, SIGNIFICANT, Diagnosis
from d2surgery.auditing.findings import ModuleAudit, ModuleStatus, TensorAudit, Thresholds, Verdict, several
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.replay import Replay
from d2surgery.auditing.tally import Tally
from d2surgery.errors import Problem, Severity
from d2surgery.measures.fidelity import LOW_GAIN, MANY, ULPS, Comparison, Survival

FEW = 16  # differing elements that are a change, not another library's rounding, when all else is replayed
ELSEWHERE = "where the exact value lies halfway, as another linear-algebra library or processor rounds"
COARSE = 0.05  # a strength known no better than this is not known
FAR = 0.1  # |λ̂ − 1| beyond which λ̂ is a rough number
NOISY = 2.5  # times the noise of rounding once: no merger known here makes more

_OPEN_OR_BETTER: dict[str, Severity] = {  # every other code is an error
    "OTHER_ROUNDING": "info",
    "LOW_SURVIVAL": "warning",
    "STRENGTH_UNCERTAIN": "warning",
    "ROUNDING_EXCESS": "warning",
}


class _Ruling(NamedTuple):
    status: ModuleStatus
    code: str = ""
    message: str = ""

    @property
    def verdict(self) -> Verdict:
        return {"wrong": "fail", "uncertain": "inconclusive"}.get(self.status, "pass")  # type: ignore[return-value]


# Modules ---------------------------------------------------------------------------------------------------------


def judge_module(
    module: str,
    kind: str,
    tensors: tuple[str, ...],
    dtype: str,
    tally: Tally,
    diagnosis: Diagnosis | None,
    limits: Thresholds,
) -> ModuleAudit:
    """`diagnosis` of a module whose bits differ from every recipe's."""
    sums = tally.comparison
    ruling = _rule(tally, dtype, diagnosis, limits)
    fit = diagnosis.fit if diagnosis else None
    names = [f"{low + 1}-{high}" if high > low + 1 else str(high) for low, high in zip((0, *ULPS), ULPS, strict=False)]
    first = tally.first
    return ModuleAudit(
        module=module,
        kind=kind,
        status=ruling.status,
        verdict=ruling.verdict,
        tensors=tensors,
        elements=sums.elements,
        mismatched_elements=sums.mismatched,
        recipe=tally.nearest.name if tally.nearest else min(tally.recipes, default=None),
        strength=fit.strength if fit else sums.strength,
        strength_error=fit.error if fit else sums.strength_error,
        residual=sums.residual,
        survival=tally.survival,
        ulps=dict(zip([*names, f">{ULPS[-1]}"], sums.ulps, strict=True)) if sums.mismatched else {},
        first_mismatch=index_of(first[2], first[0].output.shape) if first else None,
        residual_rank=diagnosis.residual_rank if diagnosis else None,
        code=ruling.code,
        message=ruling.message,
    )


def _rule(tally: Tally, dtype: str, diagnosis: Diagnosis | None, limits: Thresholds) -> _Ruling:
    sums = tally.comparison
    if not tally.finite:
        return _Ruling("wrong", "NOT_FINITE", "the merged weight holds NaN or infinity")
    if not sums.mismatched:
        return _Ruling("replayed")
    assert diagnosis is not None
    said = _strength_is(*diagnosis.fit[:2]) if diagnosis.fit else _said(sums)
    if diagnosis.code == "DELTA_UNEXPLAINED" and sums.mismatched <= FEW and sums.beyond:
        return _Ruling("wrong", "DELTA_UNEXPLAINED", _beyond(sums))  # a rank says nothing of a few elements
    if diagnosis.code and diagnosis.code != "WRONG_STRENGTH":
        rough = not diagnosis.fit and abs(sums.strength - 1) > FAR  # a number of that says nothing beside a name
        told = diagnosis.what if diagnosis.exact or rough else f"{diagnosis.what}; {said}"
        return _Ruling("wrong", diagnosis.code, told)
    ruling = _strength(sums, dtype, diagnosis, limits, said)
    if ruling is not None:
        return ruling
    if limits.exact:
        return _Ruling("wrong", "TENSOR_CHANGED", f"{_count(sums)} {_differ(sums)} from every recipe (--exact)")
    if sums.beyond:
        return _Ruling("wrong", "DELTA_UNEXPLAINED", _beyond(sums))
    excess = noise(sums, tally.survival)
    if excess > NOISY and sums.residual > 1e-3:
        return _Ruling("wrong", "ROUNDING_EXCESS", f"{excess:.1f} times the noise of rounding once; {said}")
    if excess > EXCESS:
        return _Ruling("rounding", "ROUNDING_EXCESS", f"{excess:.1f} times the noise of rounding once; {said}")
    return _Ruling("rounding", "OTHER_ROUNDING", f"{_count(sums)} {_differ(sums)}, by rounding; {said}")


def _strength(sums: Comparison, dtype: str, diagnosis: Diagnosis, limits: Thresholds, said: str) -> _Ruling | None:
    """A ruling where the strength is wrong or uncertain."""
    if isnan(sums.strength):
        return _Ruling("uncertain", "STRENGTH_UNCERTAIN", "rounding leaves nothing of the delta to measure")
    right, wrong = limits.strength_pass, limits.strength_fail
    if dtype in ("F32", "F64"):
        right = min(right, 1e-5 + sums.residual)
        wrong = min(wrong, 2 * right)
    strength, error = diagnosis.fit[:2] if diagnosis.fit else (sums.strength, sums.strength_error)
    off = abs(strength - 1)
    if diagnosis.exact or (off > wrong and off > SIGNIFICANT * error):
        what = f"{diagnosis.what}; {said}" if diagnosis.what else said
        return _Ruling("wrong", diagnosis.code or "WRONG_STRENGTH", what)
    if off > max(right, 3 * error) or SIGNIFICANT * error > COARSE:
        return _Ruling("uncertain", "STRENGTH_UNCERTAIN", said)
    return None


def pooled(
    found: Mapping[str, ModuleAudit], tallies: Mapping[str, Tally], limits: Thresholds, dtype: str
) -> dict[str, ModuleAudit]:
    """One merger treats all modules alike: what is too small to tell by itself is judged with all that only rounding
    tells from a recipe."""
    alike = [name for name, m in found.items() if m.code in ("OTHER_ROUNDING", "ROUNDING_EXCESS", "STRENGTH_UNCERTAIN")]
    alike = [name for name in alike if found[name].verdict != "fail" and not isnan(found[name].strength)]
    sums = sum((tallies[name].comparison for name in alike), Comparison())
    if len(alike) < 2 or not sums.mismatched:
        return dict(found)
    said = f"{len(alike)} modules together: {_said(sums)}"
    ruling = _strength(sums, dtype, Diagnosis(), limits, said)
    settled = dict(found)
    for name in alike:
        module = found[name]
        off = abs(module.strength - sums.strength) > SIGNIFICANT * module.strength_error
        if ruling is not None and ruling.status == "wrong":
            settled[name] = replace(module, status="wrong", verdict="fail", code=ruling.code, message=said)
        elif ruling is None and module.code == "STRENGTH_UNCERTAIN" and not off:
            settled[name] = replace(module, status="rounding", verdict="pass", code="OTHER_ROUNDING", message=said)
    return settled


def noise(sums: Comparison, survival: Survival) -> float:
    """‖merged − W0 − delta‖ in units of what the right rounding leaves of it."""
    more = 2 * (sums.de - sums.d_delta) + sums.dd
    once = max(survival.error_squared - more, 1e-14 * survival.delta_squared, 1e-300)
    return sqrt(survival.error_squared / once)


def _said(sums: Comparison) -> str:
    """λ̂ in words; rough where it is far from 1, since rounding keeps another share of λ·delta than of delta."""
    if isnan(sums.strength):
        return ""
    if abs(sums.strength - 1) > FAR:
        return f"strength about {sums.strength:.2g}"
    return _strength_is(sums.strength, sums.strength_error)


def _strength_is(strength: float, error: float) -> str:
    return f"strength {strength:.5g} ± {max(error, 1e-9):.1g}"


def _count(sums: Comparison) -> str:
    return f"{sums.mismatched} of {sums.elements} elements"


def _differ(sums: Comparison) -> str:
    return "differs" if sums.mismatched == 1 else "differ"


def _beyond(sums: Comparison) -> str:
    about = "about " if sums.mismatched >= MANY else ""
    return f"{_count(sums)} {_differ(sums)}, {about}{sums.beyond} by more than rounding"


def isolated(modules: Mapping[str, ModuleAudit], tallies: Mapping[str, Tally]) -> dict[str, ModuleAudit]:
    """A few differing elements beside modules that one recipe replays are changes, unless each lies where other sums
    of the same terms round the other way: then they say that another library or processor made the file."""
    replayed = {module.recipe for module in modules.values() if module.status == "replayed"}
    settled = {}
    for name, module in modules.items():
        sums = tallies[name].comparison
        few = module.code == "OTHER_ROUNDING" and module.mismatched_elements <= FEW
        if module.code == "OTHER_ROUNDING" and sums.halfway == sums.mismatched:
            module = replace(module, message=f"{_count(sums)} {_differ(sums)} by a unit in the last place, {ELSEWHERE}")
        elif few and module.recipe in replayed:
            one = module.mismatched_elements == 1
            what = f"{module.mismatched_elements} of {module.elements} elements {'differs' if one else 'differ'}"
            place = f"{'at' if one else 'the first at'} {list(module.first_mismatch or ())}"
            size = max((label for label, count in module.ulps.items() if count), key=len)
            message = f"{what}, {place}, by {size} unit in the last place; all else is as {module.recipe} gives it"
            module = replace(module, message=message)
        settled[name] = module
    return settled


# Tensors ---------------------------------------------------------------------------------------------------------


def shared_twice(modules: Mapping[str, ModuleAudit], shared: frozenset[str]) -> dict[str, ModuleAudit]:
    """A delta that counts twice in a tensor that two tied sides share was added once for each."""
    return {
        name: replace(m, code="TIE_DOUBLED", message=f"added once for each tied side; {m.message}")
        if m.code == "DELTA_APPLIED_TWICE" and shared & set(m.tensors)
        else m
        for name, m in modules.items()
    }


def judge_tensor(
    pair: TensorPair, replay: Replay, modules: Mapping[str, ModuleAudit], forgotten: Mapping[str, bool], cast: bool
) -> TensorAudit:
    """`forgotten`: of tensors that differ, whether they are still the base's; cast: see `cast_before`."""
    found = replay.tensors[pair.name]
    bad = found.mismatched
    code = ""
    wrong = [modules[name].code for name in pair.modules if name in modules and modules[name].verdict == "fail"]
    patched = pair.output.site is not None and bool(pair.output.site.patches)
    if pair.status == "tied":
        code = pair.otherwise if bad else ""
    elif patched:
        code = wrong[0] if wrong and bad else ""
    elif bad and not found.finite:
        code = "NOT_FINITE"
    elif bad and not found.rounding and not (cast and pair.status == "unchanged"):
        code = "TENSOR_CHANGED"
        if pair.status != "unchanged" and forgotten.get(pair.name):
            code = "BIAS_FORGOTTEN" if pair.name.endswith("bias") else "REPLACEMENT_FORGOTTEN"
    return TensorAudit(
        name=pair.name,
        status="changed" if code else pair.status,
        dtype=pair.info.dtype,
        shape=pair.output.shape,
        elements=prod(pair.output.shape),
        mismatched_elements=bad,
        first_mismatch=None if found.first is None else index_of(found.first, pair.output.shape),
        modules=pair.modules,
        code=code,
    )


def index_of(element: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major position of an element."""
    index: list[int] = []
    for size in reversed(shape):
        element, at = divmod(element, size)
        index.append(at)
    return tuple(reversed(index))


# The whole -------------------------------------------------------------------------------------------------------


def wrong_base(
    modules: Mapping[str, ModuleAudit], pairs: Iterable[TensorPair], replay: Replay
) -> dict[str, ModuleAudit]:
    """Where untouched tensors changed too, what no fault explains in the modules is another base."""
    plain = [pair for pair in pairs if pair.status == "unchanged"]
    changed = [pair for pair in plain if replay.tensors[pair.name].mismatched]
    strange = {name for name, m in modules.items() if m.code in ("DELTA_UNEXPLAINED", "ROUNDING_EXCESS")}
    full = [name for name in strange if (modules[name].residual_rank or 0) > 16]
    everywhere = len(changed) > 0.5 * len(plain) if plain else len(full) == len(modules)
    if not everywhere:
        return dict(modules)
    return {
        name: replace(m, code="WRONG_BASE", status="wrong", verdict="fail") if name in strange else m
        for name, m in modules.items()
    }


def reasons_of(modules: Mapping[str, ModuleAudit], tensors: Iterable[TensorAudit]) -> Iterator[Problem]:
    """One problem per code and message, naming the first modules or tensors."""
    groups: dict[tuple[str, str, str], list[ModuleAudit]] = {}
    for module in modules.values():
        if module.code:
            alone = module.module if module.code == "OTHER_ROUNDING" and "all else" in module.message else ""
            alone = ELSEWHERE if ELSEWHERE in module.message else alone
            groups.setdefault((module.code, module.verdict, alone), []).append(module)
    for (code, verdict, alone), group in groups.items():
        named = alone not in ("", ELSEWHERE)
        severity = "error" if verdict == "fail" else "warning" if named else _OPEN_OR_BETTER.get(code, "warning")
        message = _of_all(group) if alone == ELSEWHERE else _worst(group).message
        yield Problem(code=code, severity=severity, message=message, module=_several(group))
    low = [m for m in modules.values() if m.verdict == "pass" and not m.grid and m.survival.gain < LOW_GAIN]
    if low:
        least = min(low, key=lambda m: m.survival.gain)
        text = f"rounding to the file's dtype left {least.survival.gain:.0%} of the delta in {least.module}"
        yield Problem(code="LOW_SURVIVAL", severity="warning", message=text, module=_several(low))
    missed = [m for m in modules.values() if m.code == "DELTA_NOT_APPLIED"]
    if missed and len(missed) < len(modules):
        text = f"{len(missed)} of {len(modules)} modules are as in the base"
        yield Problem(code="PARTIAL_MERGE", message=text, module=_several(missed))
    by_code: dict[str, list[TensorAudit]] = {}
    for tensor in tensors:
        patched = any(name in modules for name in tensor.modules)
        if tensor.code and (
            not patched or tensor.code not in {modules[n].code for n in tensor.modules if n in modules}
        ):
            by_code.setdefault(tensor.code, []).append(tensor)
    for code, found in by_code.items():
        yield Problem(code=code, message=_tensors(found), module=_several(found))


def _of_all(group: list[ModuleAudit]) -> str:
    bad, total = sum(m.mismatched_elements for m in group), sum(m.elements for m in group)
    where = "1 module" if len(group) == 1 else f"{len(group)} modules"
    differ = "differs" if bad == 1 else "differ"
    return f"{bad} of {total} elements in {where} {differ} by a unit in the last place, {ELSEWHERE}"


def _worst(group: list[ModuleAudit]) -> ModuleAudit:
    return max(group, key=lambda m: m.mismatched_elements)


def _tensors(found: list[TensorAudit]) -> str:
    total = sum(t.elements for t in found)
    bad = sum(t.mismatched_elements for t in found)
    tensors = "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
    return f"{tensors}, {bad} of {total} elements" if bad else f"{tensors} of shape {list(found[0].shape)}"


def _several(found: list[ModuleAudit] | list[TensorAudit]) -> str:
    return several([item.module if isinstance(item, ModuleAudit) else item.name for item in found])
