"""What convert, extract, combine and scale share: how much to keep, where the result goes, how its error is told."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from d2surgery.checkpoint import Checkpoint, save
from d2surgery.cli import measured, output
from d2surgery.errors import refuse
from d2surgery.files.plain import plain
from d2surgery.files.tokenizers import is_of_tokenizer
from d2surgery.kinds import TABLE
from d2surgery.surgery.certificate import Certificate, Loss
from d2surgery.surgery.truncation import ALL, By, Keep

Command = TypeVar("Command", bound=Callable[..., Any])
DIRECTORY = click.Path(path_type=Path)
_CRITERIA: tuple[tuple[str, By, str], ...] = (
    ("energy", "energy", "Keep this share of Σσ², 0 to 1."),
    ("sv_fro", "sv_fro", "Keep this share of √Σσ², kohya's sv_fro."),
    ("sv_cumulative", "sv_cumulative", "Keep this share of Σσ, kohya's sv_cumulative."),
    ("sv_ratio", "sv_ratio", "Keep what is above σ₁ over this, kohya's sv_ratio."),
)
_RESULT = (
    click.option("--per-layer", is_flag=True, help="One line per module instead of one per type of module."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."),
    click.option("--quiet", is_flag=True, help="Print nothing."),
)


def keep_options(command: Command) -> Command:
    """--rank and the criteria by which fewer are kept."""
    for name, _, text in reversed(_CRITERIA):
        command = click.option(f"--{name.replace('_', '-')}", name, type=float, help=text)(command)
    rank = click.option("--rank", type=click.IntRange(1), help="The rank; with a criterion the most there may be.")
    return rank(command)


def result_options(command: Command) -> Command:
    for option in reversed(_RESULT):
        command = option(command)
    return command


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


def write(made: Checkpoint, out: Path, source: Checkpoint | None = None, form: str = "peft") -> list[str]:
    """The adapter, and its source's tokenizer beside it: the names of these files."""
    save(made, out, format=form)
    return [] if source is None else copy_tokenizer(source, out)


def copy_tokenizer(source: Checkpoint, out: Path) -> list[str]:
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
    made: Checkpoint, certificate: Certificate, out: Path, *, per_layer: bool, as_json: bool, quiet: bool, **more: Any
) -> None:
    if as_json:
        output.emit_json(plain(document(certificate, made, out) | more))
    elif not quiet:
        for line in text(made, certificate, out, per_layer):
            output.emit(line)


def document(certificate: Certificate, made: Checkpoint, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "method": certificate.method,
        "settings": dict(certificate.settings),
        "kinds": made.layout.kinds,
        "exact": certificate.exact,
        "relative_error": certificate.relative_error,
        "max_relative_error": certificate.max_relative_error,
        "modules": [
            {
                "module": module,
                "rank": loss.rank,
                "relative_error": loss.relative_error,
                "spectral_error": loss.spectral_error,
                "energy_kept": loss.energy_kept,
                "norm": loss.norm,
                "exact": loss.exact,
                "curve": list(loss.curve),
            }
            for module, loss in certificate.losses.items()
        ],
    }


def text(made: Checkpoint, certificate: Certificate, out: Path, per_layer: bool) -> Iterator[str]:
    kinds = " and ".join(TABLE[kind].title for kind in made.layout.kinds) or "no factors"
    modules = output.count(len(certificate.losses), "module")
    yield f"{output.style('OK', 'green')}  {kinds} on {modules}, {error_in_words(certificate)}"
    rows: list[tuple[str, ...]] = [("", "rank", "error", "most", "σ₁", "kept")]
    for name, members in measured.groups(certificate.losses, per_layer).items():
        rows.append((name, *_row([certificate.losses[module] for module in members])))
    yield from output.table(rows) if len(rows) > 1 else ()
    yield f"  out  {output.printable(str(out))}"


def error_in_words(certificate: Certificate) -> str:
    if certificate.exact:
        return "exact: nothing but the rounding of float32 is lost"
    worst = max(certificate.losses, key=lambda module: certificate.losses[module].relative_error)
    return (
        f"error {measured.percent(certificate.relative_error)} of the delta "
        f"(at most {measured.percent(certificate.max_relative_error)}, {output.printable(worst)})"
    )


def _row(losses: list[Loss]) -> tuple[str, ...]:
    ranks = sorted({loss.rank for loss in losses})
    errors = [loss.relative_error for loss in losses if isfinite(loss.relative_error)]
    return (
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
        measured.percent(measured.mean(errors)),
        measured.percent(max(errors, default=None)),
        measured.percent(max((loss.spectral_error for loss in losses), default=None)),
        measured.percent(measured.mean(loss.energy_kept for loss in losses)),
    )
