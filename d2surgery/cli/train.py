"""`d2surgery train`: a base, a config, data → an adapter. Every setting of the config is an option too."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

import click

from d2surgery.cli import measured, output
from d2surgery.cli.options import progress_bar
from d2surgery.machine import uncollected
from d2surgery.training.config import Setting, plain, read_config, settings
from d2surgery.training.settings import TrainConfig

if TYPE_CHECKING:
    from d2surgery.training.planning import TrainPlan

_HEADINGS = {
    "": "The run",
    "adapter": "What is trained  [adapter]",
    "data": "On what  [data]",
    "optimizer": "How  [optimizer]",
    "run": "Where, and what is written  [run]",
}


class _Command(click.Command):
    """Lists options under the section of the config that they override."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {setting.name: setting.section for setting in settings()}
        for section, heading in [*_HEADINGS.items(), ("others", "Other options")]:
            own = [
                param
                for param in self.get_params(ctx)
                if isinstance(param, click.Option) and sections.get(param.name or "", "others") == section
            ]
            records = [p.get_help_record(ctx) for p in own if isinstance(p, click.Option)]
            with formatter.section(heading):
                formatter.write_dl([record for record in records if record])


class _Ratio(click.ParamType[Any]):
    """`B=16`."""

    name = "slot=ratio"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        slot, _, ratio = str(value).partition("=")
        try:
            return slot, float(ratio)
        except ValueError:
            self.fail(f"{value!r} is not a slot and a number such as B=16", param, ctx)


class Numbers(click.ParamType[Any]):
    """`1e-4,2e-4`."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            found = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        low = 0 if self.kind is float else -1
        if not found or not all(low < number < 1e9 for number in found):
            self.fail(f"{value!r} are no numbers such as {'0,1,2' if self.kind is int else '1e-4,2e-4'}", param, ctx)
        return found


def _option(setting: Setting) -> click.Option:
    kind, default = plain(setting.type), setting.default
    flag = f"--{setting.name.replace('_', '-')}"
    note = "" if default is MISSING or default in (None, (), {}) else f"  [default: {_in_words(default)}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=setting.about.help + note)
    of = get_origin(kind)
    type_ = click.Choice(setting.words) if setting.words else {tuple: str, dict: _Ratio()}.get(of, kind)
    return click.Option([flag], type=type_, multiple=of in (tuple, dict), help=setting.about.help + note)


def _in_words(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(default) if isinstance(default, tuple) else str(default)


@click.command(name="train", cls=_Command)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--lrs", type=Numbers(float), help="A sweep: a run for each of these, as 1e-4,2e-4, under OUTPUT.")
@click.option("--seeds", type=Numbers(int), help="A sweep: and for each of these seeds, as 0,1,2. Finished runs stay.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw losses, gradients, learning rate and speed of each run: one .html page, or .png, .svg or .pdf images.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output, if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print warnings only.")
def command(
    config: Path | None,
    lrs: tuple[float, ...] | None,
    seeds: tuple[int, ...] | None,
    plot: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Fine-tune BASE with one adapter, by CONFIG (TOML), by options, or by both: options win.

    The adapter, its checkpoints, metrics.jsonl and the resolved train.toml go to OUTPUT. The loss is on the answers
    only. A run that was killed goes on with --resume and ends with the same adapter. On several GPUs: torchrun
    --nproc-per-node N -m d2surgery train …, or accelerate launch -m d2surgery train …

    --lrs and --seeds train a run for each pair, and say which learning rate has the lowest mean held-out loss; the
    same command again goes on where it was stopped.
    """
    given = {name: dict(v) if name == "lr_ratio" else v for name, v in options.items() if v is not None and v != ()}
    chosen = read_config(config, given)
    if plot is not None:
        measured.check_figures(plot)
    if lrs or seeds:
        rates, of = lrs or (chosen.optimizer.lr,), seeds or (chosen.run.seed,)
        return _sweep(chosen, rates, of, plot=plot, as_json=as_json, quiet=quiet)
    with uncollected():  # here: --help and a bad config wait for neither torch nor a model library
        from d2surgery.training.loop import train

    silent = quiet or as_json or os.environ.get("RANK", "0") != "0"

    def announce(plan: "TrainPlan") -> None:
        for line in output.problem_lines(plan.problems):
            output.emit(line, err=True)
        for line in () if silent else _before(chosen, plan):
            output.emit(line)

    _hush()
    output.hush("bitsandbytes")
    own = redirect_stdout(sys.stderr) if as_json else nullcontext()  # transformers prints when it sees WANDB_MODE
    with own, progress_bar("training", show=not silent, unit="step") as progress:
        try:
            report = train(chosen, resume=resume, progress=progress, announce=announce)
        except KeyboardInterrupt as stop:
            output.emit(str(stop), err=True)
            raise
        finally:
            _leave_group()
    if as_json and os.environ.get("RANK", "0") == "0":
        output.emit_json(asdict(report) | {"problems": [output.record(problem) for problem in report.problems]})
    for line in () if silent else _after(chosen, report):
        output.emit(line)
    if os.environ.get("RANK", "0") == "0":
        _draw([Path(chosen.output)], plot, quiet=silent)
    return 0


def _draw(runs: Sequence[Path], plot: Path | None, *, quiet: bool) -> None:
    """The curves of one or several runs."""
    if plot is None:
        return
    from d2surgery.reporting.figures.training import run_curves  # plotly
    from d2surgery.training.disk import read_metrics

    plots = [replace(run_curves(read_metrics(run), run.name), name=run.name) for run in runs]
    title = runs[0].name if len(runs) == 1 else runs[0].parent.name
    files = measured.write_figures(plots, plot, f"Training of {title}")
    for line in () if quiet else measured.wrote(files):
        output.emit(line)


def _sweep(
    config: TrainConfig,
    lrs: tuple[float, ...],
    seeds: tuple[int, ...],
    *,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Every learning rate with every seed."""
    with uncollected():
        from d2surgery.training.sweep import sweep  # as above

    _hush()
    with progress_bar("sweeping", show=not (as_json or quiet), unit="run") as progress:
        found = sweep(config, lrs, seeds, progress=progress)
    _draw([Path(found.out) / cell["out"] for cell in found.cells], plot, quiet=as_json or quiet)
    if as_json:
        output.emit_json(asdict(found))
        return 0
    rows = [["learning rate", "seeds", "held-out loss", "95 %"]]
    for rate in found.rates:
        ci = "" if rate.ci is None else " to ".join(map(output.number, rate.ci))
        rows.append([f"{rate.lr:g}", str(rate.seeds), output.number(rate.mean_loss), ci])
    for line in () if quiet else (*output.table(rows), "", f"lowest at {found.best_lr:g}; runs in {found.out}"):
        output.emit(line)
    return 0


def _leave_group() -> None:
    """Join the threads that speak to other processes: a process that ends while they run may abort."""
    from torch import distributed  # loaded by training

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


command.params += [_option(setting) for setting in settings()]


def _hush() -> None:
    """transformers' bars and notes are for its own scripts."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _before(config: TrainConfig, plan: Any) -> Iterator[str]:
    share = 100 * plan.trainable_parameters / plan.all_parameters
    ranks = " + ".join(map(str, plan.ranks))
    where = f"{output.count(plan.modules, 'module')} of {output.printable(config.base)}"
    held = f" in {plan.quantization.removesuffix('bit')} bit" if plan.quantization else ""
    scaling = output.number(plan.scaling)
    if plan.effective_scaling != plan.scaling:
        scaling += f", which weighs as {output.number(plan.effective_scaling)} of LoRA"
    yield f"training {plan.kind} on {where}{held}: rank {ranks}, scaling {scaling}"
    for at, (parent, names) in enumerate(plan.targets.items()):
        yield f"  {'' if at else 'targets':10}  {output.printable(f'{parent}: ' if parent else '')}{', '.join(names)}"
    yield f"  parameters  {plan.trainable_parameters:,} of {plan.all_parameters:,} ({share:.2f} %)"
    yield f"  items       {plan.items:,}, and {plan.held_out:,} held out"
    yield f"  steps       {plan.steps:,} of {output.count(plan.rows_per_step, 'row')}, {plan.tokens:,} tokens in all"
    if plan.resumed_from is not None:
        yield f"  resumed     after step {plan.resumed_from:,}"
    yield ""


def _after(config: TrainConfig, report: Any) -> Iterator[str]:
    first, last = report.first_eval_loss, report.last_eval_loss
    which, lower = ("held-out loss", last < first) if last is not None else ("loss (nothing held out)", True)
    if last is None:
        first, last = report.first_loss, report.last_loss
    verdict = output.style("OK", "green") if lower else output.style("NOT LOWER", "yellow")
    yield f"{verdict}  {which} {output.number(first)} → {output.number(last)}"
    if report.seconds_per_step is not None:
        yield f"  steps    {report.steps:,}, {output.number(report.seconds_per_step)} s each"
    out, base = output.printable(report.out), output.printable(config.base)
    yield f"  adapter  {out}"
    yield "next:"
    yield f"  d2surgery inspect {out}"
    whole = "UNQUANTISED" if report.quantization and not config.run.quantization else base
    yield f"  d2surgery spectrum {out} --base {whole}"
    held = f" --quantization {config.run.quantization}" if config.run.quantization else ""
    yield f"  d2surgery eval --base {base} --adapter {out}{held} --tasks FILE"
    yield f"  d2surgery merge --base {whole} --adapter {out} --out {out}-merged"
    if report.quantization:
        yield "this merges into the unquantised base; exactly what was trained merges into the dequantised one,"
        yield "which transformers' model.dequantize() gives"
