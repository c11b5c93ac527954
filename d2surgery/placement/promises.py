"""Promises that an adapter does not keep: modules of the base that its config names and that it has no factors for."""

import re
from collections.abc import Iterator

from d2surgery.errors import Problem
from d2surgery.files.header import Header
from d2surgery.formats.layout import Layout
from d2surgery.placement.sites import Landing

_SHOWN = 3


def broken_promises(layout: Layout, base: Header, landing: Landing) -> Iterator[Problem]:
    """A warning PROMISED_BUT_ABSENT, or nothing.

    Only names beside those that the adapter lands on are looked at: the config may name modules of a vision tower, say,
    that was not there when the adapter was trained. Fused experts are no modules in today's models.
    """
    landed = {patch.module: name for name, site in landing.sites.items() for patch in site.patches}
    if not landed or any(problem.severity == "error" for problem in (*layout.problems, *landing.problems)):
        return
    patterns, roots = {_numberless(name) for name in landed.values()}, {_root(name) for name in landed.values()}
    prefixes = dict(_prefixes(f"{module}.weight", name) for module, name in landed.items())
    absent: list[str] = []
    for name, info in base.tensors.items():
        if not name.endswith(".weight") or len(info.shape) < 2 or name in landing.sites or ".experts." in name:
            continue
        if _root(name) not in roots and (
            _numberless(name) != name or not any(r.startswith(_root(name)) for r in roots)
        ):
            continue
        wanted = layout.about.targets(_in_model(name, prefixes).removesuffix(".weight"))
        if wanted or (wanted is None and _numberless(name) in patterns):
            absent.append(name.removesuffix(".weight"))
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        message = f"{len(absent)} of the base's modules are targeted and have no factors"
        names = ", ".join(absent[:_SHOWN]) + more
        yield Problem(code="PROMISED_BUT_ABSENT", severity="warning", message=message, module=names)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _root(name: str) -> str:
    """What stands before the first number; of a name without one, what holds the module."""
    numbered = re.match(r"(.*?)(?:^|\.)\d+\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0].rpartition(".")[0]


def _prefixes(in_model: str, on_disk: str) -> tuple[str, str]:
    """What of a tensor's two names is left before the end that they share."""
    model, disk = in_model.split("."), on_disk.split(".")
    while model and disk and model[-1] == disk[-1]:
        model, disk = model[:-1], disk[:-1]
    return "".join(f"{part}." for part in disk), "".join(f"{part}." for part in model)


def _in_model(name: str, prefixes: dict[str, str]) -> str:
    for disk, model in prefixes.items():
        if name.startswith(disk):
            return model + name.removeprefix(disk)
    return name
