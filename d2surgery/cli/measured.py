"""What spectrum, drift and diff share: where their numbers go, and how a table of modules is put together."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from d2surgery.cli import output
from d2surgery.cli.options import jobs_option
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.plain import plain
from d2surgery.files.whole import require_folder, write_whole
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import Layout, with_scaling
from d2surgery.kinds import TABLE
from d2surgery.reporting.tidy import Row, by_type, write_rows

if TYPE_CHECKING:
    from d2surgery.checkpoint import Checkpoint
    from d2surgery.reporting.figures.parts import Plot

Command = TypeVar("Command", bound=Callable[..., Any])
IMAGES = (".png", ".svg", ".pdf")
_FILE = click.Path(path_type=Path, dir_okay=False)
_OPTIONS = (
    click.option("--per-layer", is_flag=True, help="One line per module instead of one per type of module."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."),
    click.option("--csv", type=_FILE, help="Write every number as a tidy table: one number a row, with its meaning."),
    click.option("--plot", type=_FILE, help="Write figures: one .html page, or .png, .svg or .pdf images."),
    click.option("--quiet", is_flag=True, help="Print nothing; for --csv and --plot."),
    jobs_option,
)


class Outputs(NamedTuple):
    """Where the numbers of a verb go."""

    per_layer: bool
    as_json: bool
    csv: Path | None
    plot: Path | None
    quiet: bool

    @property
    def show_progress(self) -> bool:
        return not (self.as_json or self.quiet)


def output_options(command: Command) -> Command:
    """The options that make up `Outputs`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def checked_outputs(**options: Any) -> Outputs:
    """Refuses before any work what could not be written after it."""
    outputs = Outputs(**options)
    if outputs.csv is not None:
        require_folder(outputs.csv)
    if outputs.plot is not None:
        check_figures(outputs.plot)
    return outputs


def check_figures(path: Path) -> None:
    """Refuses a file that figures could not be written into."""
    require_folder(path)
    if path.suffix.lower() not in (".html", *IMAGES):
        raise refuse("USAGE", "--plot", wanted="a file name that ends in .html, .png, .svg or .pdf", got=path.name)
    if path.suffix.lower() in IMAGES and importlib.util.find_spec("kaleido") is None:
        raise refuse("NO_IMAGES", "the Python package kaleido is not installed", file=str(path))


def open_adapter(
    adapter: str,
    base: BaseWeights | None = None,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    up_to_scale: bool = False,
) -> Layout:
    """What it holds, or refused with every error of it, before torch is imported. base: where names or heads may have
    to be looked up.

    up_to_scale: with an unknown scaling taken for 1, of LoRA only.
    """
    layout = open_layout(adapter, scale=scale, alpha=alpha)
    if base is not None:
        layout = with_base(layout, base.header.tensors, base.config)
    if up_to_scale and layout.kinds == ["lora"] and scale is alpha is None:
        layout = _up_to_scale(layout)
    raise_errors(layout.problems)
    if not layout.adapters:
        raise refuse("UNKNOWN_FORMAT", "there is no adapted module in it", file=str(layout.path))
    return layout


def _up_to_scale(layout: Layout) -> Layout:
    """With a scaling of 1 where it is unknown, and a warning that says so."""
    if all(entry.scaling is not None for entry in layout.adapters.values()):
        return layout
    message = "taken for 1: norms and singular values are up to scale, ranks are not"
    warning = Problem(code="SCALING_UNKNOWN", message=message, severity="warning", file=str(layout.path))
    known = with_scaling(layout, 1.0, None)
    return replace(known, problems=(*known.problems, warning))


def show(outputs: Outputs, document: Mapping[str, Any], text: Iterable[str], rows: Callable[[], list[Row]]) -> None:
    """The document or the text on stdout, the rows into the CSV file. `draw` has the figures."""
    if outputs.csv is not None:
        write_csv(rows(), outputs.csv)
    if outputs.as_json:
        output.emit_json(plain(document))
    elif not outputs.quiet:
        for line in text:
            output.emit(line)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        write_rows(rows, file)


def draw(outputs: Outputs, plots: Callable[[], Sequence["Plot"]], title: str) -> None:
    """The figures that --plot asks for, and a line for each file. They are made only where they are asked for."""
    if outputs.plot is None:
        return
    for line in wrote(write_figures(plots(), outputs.plot, title)):
        if outputs.show_progress:
            output.emit(line)


def write_figures(plots: Sequence["Plot"], path: Path, title: str) -> list[Path]:
    """One page, or an image per figure: the first has the name asked for, the others a suffix before the ending."""
    from d2surgery.reporting.pages import parts as page  # plotly, and only where figures are drawn

    if path.suffix.lower() not in IMAGES:
        write_whole(path, page.figures_page(plots, title))
        return [path]
    files = [path, *(path.with_name(f"{path.stem}-{plot.name}{path.suffix}") for plot in plots[1:])]
    page.write_images(plots, files)
    return files


# Text -----------------------------------------------------------------------------------------------------------------


def groups(modules: Iterable[str], per_layer: bool) -> dict[str, list[str]]:
    """`q_proj ×18` -> the modules of one type; or each module alone under its own name."""
    if per_layer:
        return {module: [module] for module in modules}
    return {f"{type_} ×{len(members)}": members for type_, members in by_type(modules).items()}


def mean(values: Iterable[float | int | None]) -> float | None:
    """Of the known and finite ones; None for none."""
    known = [value for value in values if value is not None and isfinite(value)]
    return sum(known) / len(known) if known else None


def kinds(checkpoint: "Checkpoint") -> str:
    return " and ".join(TABLE[kind].title for kind in checkpoint.layout.kinds)


def percent(value: float | None, sign: str = "") -> str:
    return "?" if value is None else f"{100 * value:{sign}.3g}%"


def wrote(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield f"wrote {output.printable(str(path))}, {output.size(path.stat().st_size)}"
