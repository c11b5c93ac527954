"""What an audit found, as records: every tensor and module with its evidence, one verdict with its reasons."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from d2surgery.errors import Problem
from d2surgery.files.plain import plain
from d2surgery.surveying.order import in_order
from d2surgery.tables import Tabular

if TYPE_CHECKING:
    from d2surgery.evaluating.behaviour import Behaviour, TaskGap
    from d2surgery.measures.fidelity import Survival

Verdict = Literal["pass", "fail", "inconclusive"]
Status = Literal["adapted", "unchanged", "replaced", "tied", "resized", "changed", "missing", "extra"]
ModuleStatus = Literal["replayed", "rounding", "wrong", "uncertain"]
STATUSES: tuple[Status, ...] = (
    "adapted", "unchanged", "replaced", "tied", "resized", "changed", "missing", "extra"
)  # fmt: skip
LEVELS = ("weights", "outputs", "logits", "task")
OPEN = frozenset(
    ("STRENGTH_UNCERTAIN", "NOT_RUNNABLE", "ON_A_GRID")
)  # codes that leave the question open: inconclusive, not fail


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a strength is right. Applied to |λ̂ − 1| of a module that no recipe replays (`audit` says why these)."""

    strength_pass: float = 0.002  # at most this is right: a scaling rounded to bfloat16, TF32 products
    strength_fail: float = 0.004  # more than this, and more than 5 standard errors, is wrong
    exact: bool = False  # one differing bit in an adapted tensor fails

    def __post_init__(self) -> None:
        if not 0 <= self.strength_pass <= self.strength_fail:
            raise ValueError("0 ≤ strength_pass ≤ strength_fail")


@dataclass(frozen=True, kw_only=True)
class TensorAudit:
    """One tensor of base ∪ merged. `adapted`, `unchanged`, `replaced`, `tied`, `resized` are as they must be."""

    name: str  # in the merged checkpoint; of a missing one, where it should be
    status: Status
    dtype: str
    shape: tuple[int, ...]
    elements: int
    mismatched_elements: int = 0  # bits other than expected
    first_mismatch: tuple[int, ...] | None = None  # index of the first of them
    modules: tuple[str, ...] = ()  # adapted modules that land in it
    code: str = ""  # of what is wrong with it


@dataclass(frozen=True, kw_only=True)
class ModuleAudit:
    """One adapted module: is its delta in the merged checkpoint, and at what strength?

    status: "replayed" bit for bit by `recipe`, "rounding" for differences within rounding, "wrong", "uncertain".
    """

    module: str
    kind: str
    status: ModuleStatus
    verdict: Verdict
    tensors: tuple[str, ...]
    elements: int
    mismatched_elements: int
    recipe: str | None  # that replays it, or comes nearest
    strength: float  # λ̂: 1 for a right merge; nan where rounding left nothing to measure; see `strength_of`
    strength_error: float  # standard
    residual: float  # ‖merged − W0 − λ̂·(expected − W0)‖/‖expected − W0‖
    survival: "Survival"  # of the delta, in the merged file
    ulps: Mapping[str, int] = field(default_factory=dict)  # mismatched elements by distance in units in the last place
    first_mismatch: tuple[int, ...] | None = None
    residual_rank: int | None = None  # rank above rounding noise of what no strength explains
    code: str = ""
    message: str = ""
    grid: str = ""  # that its first tensor is quantised to: "Q4_K", "MLX, 4 bits"
    grid_noise: float | None = None  # ‖noise of the grid‖/‖delta‖, of errors as wide as its steps


@dataclass(frozen=True, kw_only=True)
class ReceiptAudit:
    """d2surgery_merge.json against the files: by hashes only."""

    checked: tuple[str, ...]  # "merged", "base", "adapter"
    tensors: int
    mismatched: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class Audit(Tabular):
    """Is `merged` the `base` with the `adapter`?"""

    verdict: Verdict
    reasons: tuple[Problem, ...]  # errors fail; codes in OPEN leave it inconclusive; warnings and notes do neither
    base: str
    adapter: str
    merged: str
    levels: tuple[str, ...]
    thresholds: Thresholds
    recipe: str | None  # that replays the adapted modules, or most of them
    also: tuple[str, ...] = ()  # recipes that give the same bits of the first module, in the rows that were compared
    modules: Mapping[str, ModuleAudit]
    tensors: Mapping[str, TensorAudit]
    not_checked: tuple[str, ...]
    receipt: ReceiptAudit | None = None
    behaviour: "Behaviour | None" = None  # what the levels outputs and logits found
    task: "TaskGap | None" = None  # what the level task found
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __repr__(self) -> str:
        codes = "".join(f", {code}" for code in dict.fromkeys(problem.code for problem in self.reasons))
        return f"Audit({self.verdict}: {len(self.modules)} modules, {len(self.tensors)} tensors{codes})"

    def rows(self) -> list[dict[str, Any]]:
        """A row per module, its record's own names, with the gain of its survival."""
        shown = ("module", "kind", "status", "verdict", "code", "recipe", "strength", "strength_error", "residual",
                 "mismatched_elements", "elements", "message")  # fmt: skip
        return [
            {name: getattr(record, name) for name in shown} | {"gain": record.survival.gain}
            for record in in_order(self.modules).values()
        ]

    @property
    def coverage(self) -> dict[str, int]:
        """How many tensors have each status, and in all."""
        found = [tensor.status for tensor in self.tensors.values()]
        return {"total": len(found), **{status: found.count(status) for status in STATUSES}}


def verdict_of(reasons: tuple[Problem, ...]) -> Verdict:
    """Any error fails; without one, an open question is inconclusive."""
    if any(problem.severity == "error" for problem in reasons):
        return "fail"
    return "inconclusive" if any(problem.code in OPEN for problem in reasons) else "pass"


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and isfinite(value) else None


def document(audit: Audit) -> dict[str, Any]:
    """The audit as plain JSON values, with the records' own names; `tensors` counts, `tensor_list` lists."""
    return {
        "verdict": audit.verdict,
        "reasons": [_problem(problem) for problem in audit.reasons],
        "base": audit.base,
        "adapter": audit.adapter,
        "merged": audit.merged,
        "levels": list(audit.levels),
        "thresholds": asdict(audit.thresholds),
        "recipe": audit.recipe,
        "also": list(audit.also),
        "coverage": audit.coverage,
        "tensors": {status: audit.coverage[status] for status in STATUSES},
        "modules": [_module(module) for module in in_order(audit.modules).values()],
        "tensor_list": [asdict(tensor) for tensor in audit.tensors.values()],
        "not_checked": list(audit.not_checked),
        "receipt": asdict(audit.receipt) if audit.receipt else None,
        "logits": _plain(audit.behaviour.logits) if audit.behaviour and audit.behaviour.logits else None,
        "layers": [_plain(layer) for layer in audit.behaviour.layers] if audit.behaviour else [],
        "first_deviating": audit.behaviour.first_deviating if audit.behaviour else None,
        "task": _plain(audit.task) if audit.task else None,
        "seconds": audit.seconds,
        "peak_memory_bytes": audit.peak_memory_bytes,
    }


def several(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _plain(record: Any) -> dict[str, Any]:
    """A record of other modules as JSON values, its problems left out: they are among the reasons."""
    return {name: value for name, value in plain(record).items() if name != "problems"}


def _problem(problem: Problem) -> dict[str, str]:
    return asdict(problem) | {"remedy": problem.remedy}


def _module(module: ModuleAudit) -> dict[str, Any]:
    survival = module.survival
    names = ("gain", "relative_error", "cosine", "changed_share")
    numbers = {name: finite(getattr(module, name)) for name in ("strength", "strength_error", "residual", "grid_noise")}
    return asdict(module) | numbers | {"survival": {name: finite(getattr(survival, name)) for name in names}}
