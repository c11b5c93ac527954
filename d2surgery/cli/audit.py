"""`d2surgery audit`: is the merged checkpoint the base with the adapter?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from d2surgery.auditing import audit
from d2surgery.auditing.findings import LEVELS, Audit, Thresholds, document, several
from d2surgery.auditing.receipts import verify_receipt
from d2surgery.cli import output
from d2surgery.cli.options import (
    BASE_HELP,
    Base,
    Number,
    device_option,
    expert_layout_option,
    jobs_option,
    progress_bar,
    scaling_options,
)
from d2surgery.errors import refuse
from d2surgery.files.whole import require_folder, write_whole
from d2surgery.formats.layout import Packing
from d2surgery.machine import give_back
from d2surgery.surveying.order import in_order

if TYPE_CHECKING:
    from d2surgery.evaluating.items import Task

Given = TypeVar("Given")
_FILE = click.Path(path_type=Path, dir_okay=False)
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
_DEFAULTS = Thresholds()
_SHOWN = 12  # modules listed without --per-layer


class Levels(click.ParamType[tuple[str, ...]]):
    """`weights,logits`; the weights are looked at in any case."""

    name = "levels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        asked = {part.strip() for part in str(value).split(",")} | {"weights"}
        if unknown := sorted(asked - {*LEVELS}):
            self.fail(f"{', '.join(map(repr, unknown))}: the levels are {', '.join(LEVELS)}", param, ctx)
        return tuple(level for level in LEVELS if level in asked)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be audited, and how."""

    base: Path | None
    adapter: tuple[str, ...]
    merged: Path
    receipt: bool
    levels: tuple[str, ...]
    prompts: Path | None
    tasks: tuple[Path, ...]
    strength: float
    strength_pass: float
    strength_fail: float
    exact: bool
    weights_only: bool
    expert_layout: Packing | None
    scale: float | None
    alpha: float | None
    device: str


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The files that an audit is written into."""

    html: Path | None
    junit: Path | None
    sarif: Path | None

    def check(self) -> None:
        """Refuses before any work what could not be written after it."""
        for path in filter(None, (self.html, self.junit, self.sarif)):
            require_folder(path)

    def write(self, found: Audit) -> None:
        if self.junit is not None or self.sarif is not None:
            from d2surgery.reporting import audit_files  # XML, where such a file is asked for

            for path, form in ((self.junit, audit_files.junit), (self.sarif, audit_files.sarif)):
                if path is not None:
                    write_whole(path, form(found))
        if self.html is not None:
            from d2surgery.reporting.pages.audit import audit_page  # plotly, where a page is asked for

            write_whole(self.html, audit_page(found))


@click.command(name="audit")
@click.option("--base", type=Base(), help=f"{BASE_HELP} that was merged into.")
@click.option(
    "--adapter",
    multiple=True,
    help="File, directory or hub id org/name[@revision]. Given several times: the audit says which one was merged.",
)
@click.option("--merged", type=Base(), required=True, help="Model directory or hub id to be judged.")
@click.option("--level", "levels", type=Levels(), default="weights", show_default=True, help=f"Of {', '.join(LEVELS)}.")
@click.option("--prompts", type=_FILE, help="Texts for the levels outputs and logits. Default: bundled ones.")
@click.option("--tasks", type=_FILE, multiple=True, help="JSON or JSONL items for the level task; repeatable.")
@click.option("--strength", type=Number(), default=1.0, show_default=True, help="λ that was merged: W0 + λ·delta.")
@click.option(
    "--strength-pass", type=Number(), default=_DEFAULTS.strength_pass, show_default=True, help="Right: |λ̂ − 1| at most."
)
@click.option(
    "--strength-fail", type=Number(), default=_DEFAULTS.strength_fail, show_default=True, help="Wrong: |λ̂ − 1| above."
)
@click.option("--exact", is_flag=True, help="Fail on one differing bit.")
@click.option("--weights-only", is_flag=True, help="Compare neither config nor tokenizer.")
@click.option("--receipt", is_flag=True, help="Verify d2surgery_merge.json by hashes only; base and adapter optional.")
@expert_layout_option
@scaling_options
@device_option
@click.option("--per-layer", is_flag=True, help="A line for every module, not for the worst only.")
@click.option("--html", type=_FILE, help="Write the audit as one page: verdict, causes, layers, every tensor.")
@click.option("--junit", type=_FILE, help="Write JUnit XML, a test case per module and tensor.")
@click.option("--sarif", type=_FILE, help="Write SARIF 2.1.0, a result per reason.")
@jobs_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print the verdict only.")
def command(
    html: Path | None, junit: Path | None, sarif: Path | None, per_layer: bool, as_json: bool, quiet: bool, **asked: Any
) -> int:
    """Is MERGED the BASE with the ADAPTER? Every tensor accounted for, every difference explained.

    The merge is replayed by the known mergers' recipes; what none gives bit for bit is measured: its strength λ̂ with
    a standard error, and which usual fault fits. Exit code 0 pass, 1 fail, 2 could not be audited, 3 inconclusive.
    """
    pages, wanted = Pages(html=html, junit=junit, sarif=sarif), Asked(**asked)
    pages.check()
    with progress_bar("auditing", show=not (as_json or quiet)) as progress:
        found = _by_receipt(wanted, progress) if wanted.receipt else _by_weights(wanted, progress)
    pages.write(found)
    if as_json:
        output.emit_json(document(found))
    else:
        for line in [_word(found)] if quiet else describe(found, per_layer=per_layer):
            output.emit(line)
    return EXIT[found.verdict]


def _by_weights(asked: Asked, progress: Callable[[int, int], None]) -> Audit:
    give_back()
    base, adapter = _required("base", asked.base), _required("adapter", asked.adapter or None)
    right, wrong = asked.strength_pass, asked.strength_fail
    if not 0 <= right <= wrong:
        raise refuse("USAGE", "strengths", wanted="0 <= --strength-pass <= --strength-fail", got=f"{right}, {wrong}")
    if ("task" in asked.levels) != bool(asked.tasks):
        raise refuse("USAGE", "--level task and --tasks belong together")
    prompts, tasks = _material(asked)
    return audit(
        base,
        adapter,
        asked.merged,
        levels=asked.levels,
        thresholds=Thresholds(strength_pass=right, strength_fail=wrong, exact=asked.exact),
        strength=asked.strength,
        expert_layout=asked.expert_layout,
        scale=asked.scale,
        alpha=asked.alpha,
        files=not asked.weights_only,
        prompts=prompts,
        tasks=tasks,
        device=asked.device,
        progress=progress,
    )


def _material(asked: Asked) -> "tuple[list[str] | None, list[Task]]":
    """The texts and the tasks, whose readers are imported where there are some."""
    if not (asked.prompts or asked.tasks):
        return None, []
    from d2surgery.evaluating.items import read_prompts, read_task

    return read_prompts(asked.prompts) if asked.prompts else None, [read_task(path) for path in asked.tasks]


def _required(name: str, value: Given | None) -> Given:
    if value is None:
        raise refuse("USAGE", f"audit needs --{name}; only --receipt does without")
    return value


def _by_receipt(asked: Asked, progress: Callable[[int, int], None]) -> Audit:
    if len(asked.adapter) > 1:
        raise refuse(
            "USAGE", "a receipt names one adapter", wanted="--adapter once at most", got=f"{len(asked.adapter)}"
        )
    adapter = asked.adapter[0] if asked.adapter else None
    return verify_receipt(asked.merged, base=asked.base, adapter=adapter, progress=progress)


# Text ------------------------------------------------------------------------------------------------------------


def verdict_line(found: Audit) -> str:
    what = {
        "pass": "the merged checkpoint is the base with the adapter",
        "fail": "the merged checkpoint is not the base with the adapter, as it should be",
        "inconclusive": "it cannot be told",
    }[found.verdict]
    if found.receipt:
        what = "as its receipt says" if found.verdict == "pass" else "not as its receipt says"
    return f"{_word(found)}  {what}"


def _word(found: Audit) -> str:
    return output.style(found.verdict.upper(), _COLOURS[found.verdict])


def describe(found: Audit, *, per_layer: bool = False) -> Iterator[str]:
    yield verdict_line(found)
    yield from output.problem_lines(found.reasons)
    if found.recipe:
        from d2surgery.auditing.recipes import RECIPES  # torch, which has replayed it

        words = next(recipe.what for recipe in RECIPES if recipe.name == found.recipe)
        replayed = [module for module in found.modules.values() if module.status == "replayed"]
        yield f"recipe: {found.recipe}, bit for bit in {output.count(len(replayed), 'module')} ({words})"
        if found.also:
            yield from output.prose(f"the same bits, in the first module, as by {several(list(found.also))}")
    yield from _modules(found, per_layer)
    yield from _behaviour(found)
    counts = found.coverage
    named = [f"{count} {status}" for status, count in counts.items() if status != "total" and count]
    yield f"{output.count(counts['total'], 'tensor')}: {', '.join(named) or 'none'}"
    for line in found.not_checked:
        yield f"not checked: {output.printable(line)}"


def _modules(found: Audit, per_layer: bool) -> Iterator[str]:
    order = {"wrong": 0, "uncertain": 1, "rounding": 2, "replayed": 3}
    listed = sorted(in_order(found.modules).values(), key=lambda m: order[m.status])  # the worst first
    if not per_layer:
        listed = [m for m in listed if m.status != "replayed"]
    shown = listed if per_layer else listed[:_SHOWN]
    if not shown:
        return
    yield ""
    yield from output.table(
        [
            [
                module.module,
                module.code or module.status,
                f"strength {output.number(module.strength)} ± {module.strength_error:.1g}",
                f"noise {output.number(module.grid_noise)} × delta"
                if module.grid_noise is not None
                else f"{module.mismatched_elements} of {module.elements} differ",
                f"survival {output.number(module.survival.gain)}",
            ]
            for module in shown
        ]
    )
    if len(shown) < len(listed):
        yield f"  … {len(listed) - len(shown)} more (--per-layer)"
    yield ""


def _behaviour(found: Audit) -> Iterator[str]:
    logits = found.behaviour.logits if found.behaviour else None
    if logits is not None:
        numbers = (logits.kl_mean, logits.noise_floor, logits.max_abs)
        mean, floor, largest = map(output.number, numbers)
        yield (
            f"logits: KL {mean} nats, noise floor {floor}; top-1 agreement {logits.top1_agreement:.2%}; "
            f"largest difference {largest}"
        )
    if found.behaviour and found.behaviour.first_deviating:
        yield f"first layer that deviates: {found.behaviour.first_deviating}"
    if found.task is not None:
        gap, (low, high), worst = found.task.gap_pp, found.task.ci_pp, found.task.worst_gap_pp
        yield f"tasks: gap {gap:+.2f} points ({low:+.2f} to {high:+.2f}), worst {worst:+.2f}"
