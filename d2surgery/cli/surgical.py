"""What convert, resize, extract, combine and scale share: how much to keep, where it goes, how its error is told."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from d2surgery.cards import write_card
from d2surgery.cli import measured, output
from d2surgery.cli.options import Number, progress_bar
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.tokenizers import is_of_tokenizer
from d2surgery.formats.layout import Layout
from d2surgery.kinds import TABLE
from d2surgery.machine import give_back
from d2surgery.reporting.tidy import loss_rows
from d2surgery.surgery.choices import ALL, By, Keep

if TYPE_CHECKING:
    from torch import Tensor

    from d2surgery.checkpoint import Checkpoint
    from d2surgery.reporting.figures.parts import Plot
    from d2surgery.surgery.certificate import Certificate, Loss

Command = TypeVar("Command", bound=Callable[..., Any])
DIRECTORY = click.Path(path_type=Path)
_CRITERIA: tuple[tuple[str, By, str], ...] = (
    ("energy", "energy", "Keep this share of Σσ², 0 to 1."),
    ("sv_fro", "sv_fro", "Keep this share of √Σσ², kohya's sv_fro."),
    ("sv_cumulative", "sv_cumulative", "Keep this share of Σσ, kohya's sv_cumulative."),
    ("sv_ratio", "sv_ratio", "Keep what is above σ₁ over this, kohya's sv_ratio."),
)


def keep_options(command: Command) -> Command:
    """--rank and the criteria by which fewer are kept."""
    for name, _, text in reversed(_CRITERIA):
        command = click.option(f"--{name.replace('_', '-')}", name, type=Number(), help=text)(command)
    rank = click.option("--rank", type=click.IntRange(1), help="The rank; with a criterion the most there may be.")
    return rank(command)


def chosen(out: Path | None, options: dict[str, Any]) -> tuple[Keep, measured.Outputs]:
    """How much to keep and what to print, out of the options of these; refuses before any work what is written over."""
    give_back()
    if out is not None:
        require_new(out)
    given = {name: options.pop(name) for name, _, _ in _CRITERIA}
    keep = keep_of(options.pop("rank"), given, extra=options.pop("compat", None) == "kohya")
    return keep, measured.checked_outputs(**options)


def open_adapter(adapter: str, base: BaseWeights | None = None, **reading: Any) -> Layout:
    """As `measured.open_adapter`; what is made of it says its sha256, which is found while torch is imported."""
    layout = measured.open_adapter(adapter, base, **reading)
    _ = layout.header.hashing
    return layout


def calibration_options(command: Command) -> Command:
    """--calibration, and the bound on the error that it is weighed for."""
    text = click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False),
                        help="A text: make the error in the outputs on it least. Needs --base.")  # fmt: skip
    most = click.option("--max-error", type=Number(), help="Refuse a module whose relative error would be above this.")
    return most(text(command))


def check_calibration(base: Path | None, text: Path | None) -> None:
    """Refuses a text without the model that is to read it."""
    if text is not None and base is None:
        raise refuse("USAGE", "--calibration runs the base", wanted="--base", got="none")


def weights_of(
    base: Path | None, text: Path | None, checkpoint: "Checkpoint", outputs: measured.Outputs
) -> "dict[str, Tensor] | None":
    """√ of the second moments of the modules' inputs on the text, if one is given."""
    if text is None or base is None:
        return None
    from d2surgery.evaluating.moments import input_moments  # transformers

    with progress_bar("reading", show=outputs.show_progress) as progress:
        return input_moments(base, text, checkpoint, progress=progress)


def keep_of(rank: int | None, criteria: Mapping[str, float | None], *, extra: bool = False) -> Keep:
    """Of the options of `keep_options`. Raises USAGE for two criteria."""
    given = [(by, value) for name, by, _ in _CRITERIA if (value := criteria.get(name)) is not None]
    if len(given) > 1:
        raise refuse("USAGE", "one criterion", got=" and ".join(by for by, _ in given))
    by, value = given[0] if given else (None, 0.0)
    if by is None and rank is None:
        return ALL
    return Keep(rank=rank, by=by, value=value, extra=int(extra and by is not None))


def require_new(out: Path) -> None:
    """Nothing is written over, and that is said before any work."""
    if (out / "adapter_model.safetensors").exists():
        raise refuse("OUTPUT_EXISTS", "an adapter is there already", file=str(out))
    if out.exists() and not out.is_dir():
        raise refuse("OUTPUT_EXISTS", "a file is there", file=str(out), wanted="a directory")
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        got = ", ".join(there[:4]) + (" …" if len(there) > 4 else "")
        raise refuse("OUTPUT_EXISTS", "the directory is not empty", file=str(out), wanted="a new one", got=got)


def write(made: "Checkpoint", out: Path, source: "Checkpoint | None" = None, form: str = "peft") -> list[str]:
    """The adapter, and its source's tokenizer beside it: the names of these files."""
    from d2surgery.checkpoint import save  # torch, which made it

    save(made, out, format=form)
    write_card(out, base_model=(source or made).layout.base_model or "")
    return [] if source is None else copy_tokenizer(source, out)


def copy_tokenizer(source: "Checkpoint", out: Path) -> list[str]:
    """The tokenizer that lies beside an adapter: the names of its files."""
    if not source.layout.format:
        return []
    beside = sorted(
        file for file in source.layout.path.parent.iterdir() if is_of_tokenizer(file.name) and file.is_file()
    )
    for file in beside:
        shutil.copyfile(file, out / file.name)
    return [file.name for file in beside]


def show(
    made: "Checkpoint", certificate: "Certificate", out: Path | None, outputs: measured.Outputs, **more: Any
) -> None:
    """As text or as JSON, and the error against the rank as figures and rows."""
    told = document(certificate, made, out) | more
    measured.show(outputs, told, text(made, certificate, out, outputs.per_layer), lambda: loss_rows(certificate.losses))

    def figures() -> list["Plot"]:
        from d2surgery.reporting.figures.losses import error_curves, error_map  # plotly, and only for figures

        return [error_map(certificate.losses), error_curves(certificate.losses)]

    measured.draw(outputs, figures, f"What {certificate.method} lost")


def document(certificate: "Certificate", made: "Checkpoint", out: Path | None) -> dict[str, Any]:
    return {
        "out": None if out is None else str(out),
        "method": certificate.method,
        "settings": dict(certificate.settings),
        "kinds": made.layout.kinds,
        "exact": certificate.exact,
        "relative_error": certificate.relative_error,
        "max_relative_error": certificate.max_relative_error,
        "weighted_error": certificate.weighted_error,
        "modules": [
            {
                "module": module,
                "rank": loss.rank,
                "relative_error": loss.relative_error,
                "spectral_error": loss.spectral_error,
                "energy_kept": loss.energy_kept,
                "norm": loss.norm,
                "exact": loss.exact,
                "weighted_error": loss.weighted_error,
                "curve": list(loss.curve),
            }
            for module, loss in certificate.losses.items()
        ],
    }


def text(made: "Checkpoint", certificate: "Certificate", out: Path | None, per_layer: bool) -> Iterator[str]:
    kinds = " and ".join(TABLE[kind].title for kind in made.layout.kinds) or "no factors"
    modules = output.count(len(certificate.losses), "module")
    yield f"{output.style('OK', 'green')}  {kinds} on {modules}, {error_in_words(certificate)}"
    rows: list[tuple[str, ...]] = [
        ("", "rank", "error", "most", "σ₁", "kept", "outputs" if certificate.weighted_error is not None else "")
    ]
    for name, members in measured.groups(certificate.losses, per_layer).items():
        rows.append((name, *_row([certificate.losses[module] for module in members])))
    yield from output.table(rows) if len(rows) > 1 else ()
    if out is not None:
        yield f"  out  {output.printable(str(out))}"


def error_in_words(certificate: "Certificate") -> str:
    if certificate.exact:
        return "exact: nothing but the rounding of float32 is lost"
    worst = max(certificate.losses, key=lambda module: certificate.losses[module].relative_error)
    of_outputs = certificate.weighted_error
    return (
        f"error {measured.percent(certificate.relative_error)} of the delta "
        f"(at most {measured.percent(certificate.max_relative_error)}, {output.printable(worst)})"
        + ("" if of_outputs is None else f", {measured.percent(of_outputs)} of what it puts out on the text")
    )


def _row(losses: "list[Loss]") -> tuple[str, ...]:
    ranks = sorted({loss.rank for loss in losses})
    weighted = [loss.weighted_error for loss in losses]
    errors = [loss.relative_error for loss in losses if isfinite(loss.relative_error)]
    return (
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
        measured.percent(measured.mean(errors)),
        measured.percent(max(errors, default=None)),
        measured.percent(max((loss.spectral_error for loss in losses), default=None)),
        measured.percent(measured.mean(loss.energy_kept for loss in losses)),
        measured.percent(measured.mean(weighted)) if any(value is not None for value in weighted) else "",
    )
