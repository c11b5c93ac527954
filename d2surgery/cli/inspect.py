"""`d2surgery inspect`: what an adapter is, from its header alone unless values are asked for."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2surgery.cli import output
from d2surgery.cli.options import Adapter, Base, Engine, expert_layout_option, scaling_options
from d2surgery.errors import Problem
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import AdapterLayout, Layout, Packing
from d2surgery.kinds import TABLE
from d2surgery.surveying.order import in_order

if TYPE_CHECKING:
    from d2surgery.formats.engines import Landing

SEVERITIES = ("info", "warning", "error")  # from the mildest
NUMBERS = ("frobenius_norm", "spectral_norm", "energy_entropy_rank", "entropy_rank", "stable_rank", "energy_rank_90")

Numbers = Mapping[str, Mapping[str, float | int | None]]  # module -> name -> value


@click.command(name="inspect")
@click.argument("adapter", type=Adapter())
@click.option("--per-layer", is_flag=True, help="One line per module instead of one per kind of module.")
@click.option("--numbers", is_flag=True, help="Also read the values: norms and ranks of each update, NaN, infinity.")
@expert_layout_option
@scaling_options
@click.option("--base", type=Base(), help="Also check that it fits this model directory.")
@click.option("--for", "engine", type=Engine(), help="Also say what this engine makes of it.")
@click.option(
    "--fail-on",
    type=click.Choice([*SEVERITIES, "never"]),
    default="error",
    show_default=True,
    help="Exit with 1 when a problem is this bad or worse.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print problems only.")
def command(
    adapter: str,
    per_layer: bool,
    numbers: bool,
    expert_layout: Packing | None,
    scale: float | None,
    alpha: float | None,
    base: Path | None,
    engine: str | None,
    fail_on: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """What an adapter is: format, kinds, base, ranks, scalings, targets, and everything wrong with it.

    Reads names and shapes only, so it takes a moment and cannot see NaN; --numbers reads the values too.
    """
    layout = open_layout(adapter, expert_layout=expert_layout, scale=scale, alpha=alpha)
    touched: int | None = None
    misfits: list[Problem] = []
    if base is not None:
        layout, touched, misfits = _land(layout, base)
    problems = list(layout.problems)
    values: Numbers | None = None
    if numbers:
        values, found = _read_numbers(layout)
        problems += found
    problems += misfits
    landing = _landing(layout, engine)
    problems += landing.problems if landing else ()
    layout = replace(layout, adapters=in_order(layout.adapters), problems=tuple(problems))
    if as_json:
        told = {"base_tensors_touched": touched, "engine": engine, "fates": landing.fates if landing else None}
        output.emit_json(_document(layout, values) | told)
    else:
        for line in _problems(layout) if quiet else describe(layout, per_layer, values):
            output.emit(line)
        if touched is not None and not quiet:
            output.emit(f"{output.count(touched, 'tensor')} of {output.printable(str(base))} would change.")
        if landing is not None and not quiet:
            output.emit(f"{landing.title} applies {landing.applied} of {len(landing.fates)} as trained.")
    return int(_worst(problems) >= [*SEVERITIES, "never"].index(fail_on))


def _landing(layout: Layout, engine: str | None) -> "Landing | None":
    if engine is None:
        return None
    from d2surgery.formats.engines import lands  # a fiftieth of what it takes to describe an adapter

    return lands(layout, engine)


def _worst(problems: Iterable[Problem]) -> int:
    """The index into SEVERITIES of the worst problem, -1 for none."""
    return max((SEVERITIES.index(problem.severity) for problem in problems), default=-1)


def _read_numbers(layout: Layout) -> tuple[Numbers, list[Problem]]:
    from d2surgery.surveying.numbers import read_numbers  # torch, and only here

    return read_numbers(layout)


def _land(layout: Layout, base: Path) -> tuple[Layout, int, list[Problem]]:
    """The layout with what the base says beside the file, how many of its tensors change, and what does not fit."""
    from d2surgery.files.base import on_a_grid, read_model_config
    from d2surgery.files.checkpoints import read_checkpoint_header
    from d2surgery.placement.bases import other_base
    from d2surgery.placement.promises import broken_promises
    from d2surgery.placement.sites import sites

    header, config = read_checkpoint_header(base), read_model_config(base)
    layout = with_base(layout, header.tensors, config)
    landing = sites(layout, header, config)
    promises = broken_promises(layout, header, landing)
    problems = [*on_a_grid(header), *landing.problems, *promises, *other_base(layout.base_model, base, config)]
    return layout, len(landing.sites), problems


# As JSON --------------------------------------------------------------------------------------------------------------


def _document(layout: Layout, numbers: Numbers | None) -> dict[str, Any]:
    return {
        "path": str(layout.path),
        "format": layout.format,
        "format_rule": layout.rule,
        "peft_version": layout.about.version,
        "kinds": layout.kinds,
        "base_model": layout.base_model,
        "task": layout.about.task,
        "alpha": layout.about.alpha,
        "dropout": layout.about.dropout,
        "parameters": _parameters(layout),
        "history": [dict(step) for step in layout.about.history],
        "replaced_parameters": _replaced_parameters(layout),
        "file_bytes": layout.path.stat().st_size,
        "values_read": numbers is not None,
        "tensors_total": len(layout.header.tensors),
        "tensors_accounted": len(list(layout.accounted())),
        "modules": [
            _module(layout, a) | ({} if numbers is None else dict.fromkeys(NUMBERS) | dict(numbers.get(a.module, {})))
            for a in layout.adapters.values()
        ],
        "replacements": [_replacement(layout, tensor, key) for tensor, key in layout.replacements.items()],
        "rows": [
            {"tensor": tensor, "key": rows.key, "indices": list(rows.indices)} for tensor, rows in layout.rows.items()
        ],
        "unread": list(layout.unread),
        "problems": [output.record(problem) for problem in layout.problems],
    }


def _module(layout: Layout, adapter: AdapterLayout) -> dict[str, Any]:
    return {
        "module": adapter.module,
        "kind": adapter.kind,
        "stored": adapter.stored,
        "rank": adapter.rank,
        "ranks": dict(adapter.ranks),
        "scaling": adapter.scaling,
        **{name: adapter.settings.get(name) for name in ("along", "tau", "form")},
        "experts": adapter.experts,
        "out_features": adapter.out_features,
        "in_features": adapter.in_features,
        "dtype": adapter.dtype,
        "dtypes": _dtypes(layout, adapter),
        "slots": adapter.keys,
    }


def _replacement(layout: Layout, tensor: str, key: str) -> dict[str, Any]:
    info = layout.header.tensors[key]
    return {"tensor": tensor, "key": key, "shape": list(info.shape), "dtype": info.dtype}


def _dtypes(layout: Layout, adapter: AdapterLayout) -> list[str]:
    """Of all its tensors, the first factor's first."""
    return list(dict.fromkeys(layout.header.tensors[key].dtype for key in adapter.keys.values()))


def _parameters(layout: Layout) -> int:
    """How many numbers were trained in factors, magnitudes and biases."""
    keys = {key for adapter in layout.adapters.values() for key in (*adapter.keys.values(), *adapter.numbers)}
    return sum(prod(shape) for key in keys if (shape := layout.header.tensors[key].shape))  # an alpha has none


def _replaced_parameters(layout: Layout) -> int:
    """How many numbers stand in place of the base's."""
    keys = {*layout.replacements.values(), *(rows.key for rows in layout.rows.values())}
    return sum(prod(layout.header.tensors[key].shape) for key in keys)


# As text --------------------------------------------------------------------------------------------------------------


def describe(layout: Layout, per_layer: bool = False, numbers: Numbers | None = None) -> Iterable[str]:
    """Verdict, why, what is in it, coverage."""
    yield from _verdict(layout)
    yield from _problems(layout)
    if layout.adapters:
        yield ""
        groups = [[a] for a in layout.adapters.values()] if per_layer else _groups(layout)
        yield from output.table([_row(layout, group, per_layer, numbers) for group in groups])
    if layout.replacements or layout.rows:
        yield ""
        yield "replacing the base's values:"
        yield from output.table([*_replacement_rows(layout), *_token_rows(layout)])
    yield ""
    yield _coverage(layout)
    if numbers is None:
        yield "Names and shapes only: NaN would not show. --numbers reads the values."
    else:
        yield "Values read. Norms and ranks are those of the updates, before any normalisation; means over a line."


def _problems(layout: Layout) -> list[str]:
    """Without the file, which stands above."""
    return output.problem_lines(replace(problem, file="") for problem in layout.problems)


def _verdict(layout: Layout) -> list[str]:
    tally = [
        output.count(n, {"info": "note"}.get(severity, severity))
        for severity in reversed(SEVERITIES)
        if (n := sum(problem.severity == severity for problem in layout.problems))
    ]
    worst = SEVERITIES[_worst(layout.problems)] if layout.problems else "ok"
    verdict = output.style("OK" if worst in ("ok", "info") else worst.upper(), output.COLOURS[worst])
    what = " and ".join(TABLE[kind].title for kind in layout.kinds) or "no adapter"
    version = f" {layout.about.version}" if layout.about.version else ""
    facts = [
        f"  file    {layout.path}, {output.size(layout.path.stat().st_size)}",
        f"  format  {layout.format}{version}: {layout.rule}",
        f"  base    {layout.base_model or 'not named'}",
        *(
            [f"  trained {', '.join(_trained(layout))}"]
            if layout.adapters or layout.replacements or layout.rows
            else []
        ),
    ]
    facts += [f"  made    {_step(step)}" for step in layout.about.history]
    on = f"{what} on {output.count(len(layout.adapters), 'module')}" if layout.adapters else what
    return [f"{verdict}  {': '.join(filter(None, [on, ', '.join(tally)]))}", *map(output.printable, facts)]


def _step(step: Mapping[str, Any]) -> str:
    """One step of what surgery made the file: `convert of adapter_model.safetensors 1a2b3c4d on model.safetensors
    5e6f7a8b, error 3.9%`."""
    inputs = step.get("inputs")
    files = [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    named = [(entry.get("what"), f"{entry.get('file')} {str(entry.get('sha256'))[:8]}") for entry in files]
    of, on = (" and ".join(name for what, name in named if (what == "base") is is_base) for is_base in (False, True))
    error = step.get("relative_error")
    said = f", error {100 * error:.3g}%" if isinstance(error, int | float) and not step.get("exact") else ", exact"
    return f"by {step.get('method')!s}{f' of {of}' if of else ''}{f' on {on}' if on else ''}{said}"


def _trained(layout: Layout) -> Iterator[str]:
    """What people ask first: how many parameters, alpha and dropout as the config has them, for what."""
    about, replaced = layout.about, _replaced_parameters(layout)
    yield f"{_parameters(layout):,} parameters" + (f" and {replaced:,} that replace the base's" if replaced else "")
    if about.alpha is not None:
        yield f"alpha {about.alpha:g}"
    if about.dropout is not None:
        yield f"dropout {about.dropout:g}"
    if about.task is not None:
        yield f"for {about.task}"


def _groups(layout: Layout) -> list[list[AdapterLayout]]:
    """Those of the same name, kind and shape, across layers."""
    groups: dict[tuple[object, ...], list[AdapterLayout]] = {}
    for a in layout.adapters.values():
        dtypes = tuple(_dtypes(layout, a))
        key = (_leaf(a.module), a.kind, a.stored, a.experts, a.out_features, a.in_features, dtypes)
        groups.setdefault(key, []).append(a)
    return list(groups.values())


def _leaf(module: str) -> str:
    """The part of a name that layers share: `q_proj`, `to_out.0`, `unet_down_blocks_*_proj_in`."""
    if "." not in module:
        return re.sub(r"(?<=_)\d+(?=_|$)", "*", module)
    if (last := module.rpartition(".")[2]).isidentifier():
        return last
    return re.split(r"\.(?=[^.]*[^\d.][^.]*(?:\.\d+)*$)", module)[-1]


def _row(layout: Layout, group: list[AdapterLayout], per_layer: bool, numbers: Numbers | None) -> list[str]:
    first = group[0]
    special = [TABLE[first.kind].title] if first.kind != "lora" else []
    special += [first.stored] if first.stored in ("embedding", "conv") else []
    special += [f"{first.experts} experts"] if first.experts > 1 else []
    special += [f"along {first.axis}"] if first.kind == "d2lora" else []
    return [
        first.module if per_layer else f"{_leaf(first.module)} ×{len(group)}",
        "rank " + _ranks(group),
        "scaling " + _range([a.scaling for a in group]),
        f"({first.in_features} → {first.out_features})",
        " and ".join(_dtypes(layout, first)),
        " ".join(special),
        *([] if numbers is None else _norms(group, numbers)),
    ]


def _ranks(group: list[AdapterLayout]) -> str:
    """`8`, `2–16`, or per group of factors `4+4`."""
    each = [_span([a.ranks[name] for a in group]) for name in group[0].ranks]
    return "+".join(each)


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or min(known) == max(known):
        return output.number(known[0] if known else None)
    return f"{output.number(min(known))}–{output.number(max(known))}"


def _norms(group: list[AdapterLayout], numbers: Numbers) -> Iterator[str]:
    """The mean over the group of what the values tell of the updates."""
    from d2surgery.measures.table import MEASURES  # which names and shapes alone need none of

    for name in ("frobenius_norm", "spectral_norm", "energy_entropy_rank"):
        known = [value for a in group if (value := numbers.get(a.module, {}).get(name)) is not None]
        yield f"{MEASURES[name].word} {output.number(sum(known) / len(known) if known else None)}"


def _replacement_rows(layout: Layout) -> list[list[str]]:
    return [
        [tensor, " × ".join(map(str, info.shape)), info.dtype]
        for tensor, key in layout.replacements.items()
        for info in [layout.header.tensors[key]]
    ]


def _token_rows(layout: Layout) -> list[list[str]]:
    return [
        [tensor, output.count(len(rows.indices), "row"), layout.header.tensors[rows.key].dtype]
        for tensor, rows in layout.rows.items()
    ]


def _coverage(layout: Layout) -> str:
    slots = sum(len(adapter.slots) for adapter in layout.adapters.values())
    unaccounted = len(layout.header.tensors) - len(list(layout.accounted()))
    parts = [
        f"{slots} in {output.count(len(layout.adapters), 'adapter')}",
        output.count(len(layout.replacements), "replacement"),
        *([f"token rows in {len(layout.rows)}"] if layout.rows else []),
        f"{unaccounted} unaccounted",
    ]
    return f"{output.count(len(layout.header.tensors), 'tensor')}: {', '.join(parts)}"
