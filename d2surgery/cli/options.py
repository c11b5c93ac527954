"""What merge and plan have in common: the options that name a merge, and a progress bar."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from d2surgery.errors import D2SurgeryError
from d2surgery.files.dtypes import DTYPE_NAMES as DTYPE_NAMES
from d2surgery.files.dtypes import dtype_name
from d2surgery.files.locate import locate_base
from d2surgery.machine import jobs

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem  # which a shell asks for, and nobody else

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Bytes(click.ParamType[int]):
    """`400MB`, `5GB`, `2GiB`, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?I?)B?\s*", str(value).upper())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a size such as 400MB or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Number(click.ParamType[float]):
    """A number, and not infinity or NaN, which Python's float takes too."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = nan
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Weighted(click.ParamType[tuple[str, float]]):
    """ADAPTER or ADAPTER:WEIGHT; a colon that is part of a path, or of no number, stays one."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, colon, weight = str(value).rpartition(":")
        looks = re.fullmatch(r"[-+]?([\d.]+(e[-+]?\d+)?|nan|inf(inity)?)", weight, re.IGNORECASE)
        if not (colon and name and looks) or Path(value).exists():
            return str(value), 1.0
        return name, Number().convert(weight, param, ctx)


class Dtype(click.Choice[str]):
    """The safetensors name of an output dtype, by the name people use."""

    def __init__(self) -> None:
        super().__init__(sorted(DTYPE_NAMES))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(dtype_name(value))
        except D2SurgeryError:  # click says what there is to choose from
            return DTYPE_NAMES[super().convert(value, param, ctx)]


class Engine(click.Choice[str]):
    """One of the engines that adapters are served or trained on; the table of them is read where one is asked for."""

    def __init__(self) -> None:
        self.case_sensitive = True  # all that Choice's own sets beside the choices

    @cached_property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from d2surgery.formats.engines import ENGINES

        return tuple(ENGINES)


class Adapter(click.ParamType[str]):
    """A file, a directory or a hub id: as it was given; a shell completes paths."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        return click.Path().shell_complete(ctx, param, incomplete)


class Base(click.ParamType[Path]):
    """The directory of a model; of a hub id, where huggingface_hub keeps it."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return locate_base(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        return click.Path(file_okay=False).shell_complete(ctx, param, incomplete)


BASE_HELP = "Model directory or hub id org/name[@revision]"
_DIRECTORY = click.Path(path_type=Path)
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 …")
cache_option = click.option(
    "--cache", type=_DIRECTORY, help="Keep finished dense spectra here: a second run takes up where one stopped."
)
exact_signs_option = click.option(
    "--exact-signs", is_flag=True, help="Count the signs of every entry of large modules too: minutes for an 8B model."
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1),
    expose_value=False,
    callback=lambda ctx, param, value: value and ctx.with_resource(jobs(value)),
    help="Threads that share the tensors. Default: one for each core, up to eight.",
)
expert_layout_option = click.option(
    "--expert-layout",
    type=click.Choice(["interleaved", "grouped"]),
    help="How experts share lora_B's columns: as PEFT packs them, or as unsloth did. Default: as the file says.",
)
_SCALING = (
    click.option("--scale", type=Number(), help="What multiplies B·A, where neither the file nor a config says it."),
    click.option("--alpha", type=Number(), help="The same as alpha over the rank."),
)
_OUT = click.option("--out", type=_DIRECTORY, required=True, help="Directory to be made.")
_OPTIONS = (
    click.option("--base", type=Base(), required=True, help=f"{BASE_HELP}."),
    click.option("--adapter", type=Adapter(), required=True, help="File, directory or hub id org/name[@revision]."),
    click.option("--dtype", type=Dtype(), help="Of all floating-point tensors. Default: as in the base."),
    click.option("--strength", type=Number(), default=1.0, show_default=True, help="λ in W0 + λ·delta; 0 is the base."),
    click.option("--max-memory", type=Bytes(), help="Resident memory that may be used, such as 400MB."),
    click.option("--shard-size", type=Bytes(), default="5GB", show_default=True, help="Largest output file."),
    expert_layout_option,
    *_SCALING,
    click.option(
        "--tokenizer",
        type=click.Choice(["adapter", "base"]),
        default="adapter",
        show_default=True,
        help="Whose tokenizer to write; the base's where the adapter has none.",
    ),
    device_option,
)


def job_options(command: Command) -> Command:
    """The options of `merge`."""
    return _with(command, (_OUT, *_OPTIONS))


def planned_options(command: Command) -> Command:
    """Those of `plan`, which needs no output."""
    return _with(command, (click.option("--out", type=_DIRECTORY, help="Directory that merge would make."), *_OPTIONS))


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def scaling_options(command: Command) -> Command:
    """The options for a scaling that a file does not carry."""
    for option in reversed(_SCALING):
        command = option(command)
    return command


@contextmanager
def progress_bar(label: str, *, show: bool, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, only on a terminal; yields progress(done, total) in units, bytes by default."""
    if not show or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm  # seldom needed

    with tqdm(desc=label, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
