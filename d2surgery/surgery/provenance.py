"""What surgery says of itself in the header of a file that it made: inputs, method, and what each module lost."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from math import isfinite
from typing import Any

from d2surgery.checkpoint import Checkpoint
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import Header
from d2surgery.surgery.certificate import Certificate, Loss

_POINTS = 65  # of a curve that are written
_MODULES = 2000  # whose losses are written; of more the file's own numbers stay
Step = Mapping[str, Any]


def history(
    checkpoints: Sequence[Checkpoint], certificate: Certificate, base: BaseWeights | None = None
) -> tuple[Step, ...]:
    """What the first of them was before, and this step; modules are told of the last step only.

    base: where its values decided what was made.
    """
    inputs = [entry for each in checkpoints for entry in inputs_of(each)]
    inputs += files_of(base.header, "base") if base is not None else ()
    before = [{name: value for name, value in step.items() if name != "modules"}
              for step in checkpoints[0].layout.about.history]  # fmt: skip
    return (*before, step_of(certificate, inputs))


def step_of(certificate: Certificate, inputs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Inputs by sha256, version, method, errors; no path and no time."""
    losses = certificate.losses
    told = {module: _told(loss) for module, loss in losses.items()} if len(losses) <= _MODULES else {}
    return {
        "method": certificate.method,
        "settings": dict(certificate.settings),
        "inputs": list(inputs),
        "d2surgery": version("d2surgery"),
        "exact": certificate.exact,
        "relative_error": certificate.relative_error,
        "max_relative_error": certificate.max_relative_error,
        "modules": told,
    }


def _told(loss: Loss) -> dict[str, Any]:
    numbers = {"norm": loss.norm, "relative_error": loss.relative_error, "spectral_error": loss.spectral_error}
    numbers |= {} if loss.weighted_error is None else {"weighted_error": loss.weighted_error}
    known = {name: float(f"{value:.6g}") for name, value in numbers.items() if isfinite(value)}
    return {"rank": loss.rank, **known, "curve": [float(f"{error:.3g}") for error in loss.curve[:_POINTS]]}


def losses_of(step: Step) -> dict[str, Loss]:
    """What the header of a file, which may be anybody's, says that each module lost; without what makes no sense."""
    modules = step.get("modules")
    found = {}
    for module, told in modules.items() if isinstance(modules, dict) else ():
        if not isinstance(told, dict):
            continue
        numbers: list[Any] = [told.get(name) for name in ("norm", "relative_error", "spectral_error")]
        curve = told.get("curve", [])
        weighted = told.get("weighted_error")
        if all(map(_is_error, numbers)) and type(told.get("rank")) is int and isinstance(curve, list):
            norm, relative, spectral = numbers
            found[str(module)] = Loss(
                rank=told["rank"], norm=norm, relative_error=relative, spectral_error=spectral, exact=False,
                curve=tuple(curve) if all(map(_is_error, curve)) else (),
                weighted_error=weighted if _is_error(weighted) else None,
            )  # fmt: skip
    return found


def _is_error(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value >= 0


def inputs_of(checkpoint: Checkpoint) -> Iterator[dict[str, str]]:
    """The files of an adapter that came from files."""
    if checkpoint.layout.format:
        yield from files_of(checkpoint.layout.header, "adapter")


def files_of(header: Header, what: str) -> Iterator[dict[str, str]]:
    for file, digest in zip(header.files, header.hashing.wait(), strict=True):
        yield {"what": what, "file": file.name, "sha256": digest}
