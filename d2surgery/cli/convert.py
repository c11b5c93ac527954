"""`d2surgery convert`: an adapter as another kind, of other ranks or in another format, with the error of this."""

from pathlib import Path

import click

from d2surgery.adapters.forwards import Axis
from d2surgery.cli import formats, measured, surgical
from d2surgery.cli.formats import WRITTEN
from d2surgery.cli.options import BASE_HELP, Base, Bytes, progress_bar, scaling_options
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.kinds import TABLE
from d2surgery.surgery.rescaling import rescale
from d2surgery.surgery.resizing import budget as spread
from d2surgery.surgery.resizing import convert


@click.command(name="convert")
@click.argument("adapter")
@click.argument("out", type=surgical.DIRECTORY)
@click.option("--kind", type=click.Choice(list(TABLE)), help="The kind to make. Default: what it is.")
@click.option("--base", type=Base(), help=f"{BASE_HELP}; DoRA and D2-LoRA need it.")
@surgical.keep_options
@click.option("--max-error", type=float, help="Refuse a module whose relative error would be above this.")
@click.option("--budget", type=Bytes(), help="Bytes in float32 for all ranks together, spread over the modules.")
@click.option("--compat", type=click.Choice(["kohya"]), help="Keep one rank more than the criterion, as kohya does.")
@click.option("--along", type=click.Choice(["out_features", "in_features"]), help="The axis of DoRA or D2-LoRA.")
@click.option("--tau", type=float, help="D2-LoRA's τ. Default: the adapter's, else 0.5.")
@click.option("--rescale-base", type=surgical.DIRECTORY, help="Write a rescaled base here: LoRA is then exact.")
@click.option("--to", "form", type=click.Choice(WRITTEN), help="The format to write, read back and compared.")
@scaling_options
@surgical.result_options
def command(
    adapter: str,
    out: Path,
    kind: str | None,
    base: Path | None,
    rank: int | None,
    max_error: float | None,
    budget: int | None,
    compat: str | None,
    along: Axis | None,
    tau: float | None,
    rescale_base: Path | None,
    form: str | None,
    scale: float | None,
    alpha: float | None,
    per_layer: bool,
    as_json: bool,
    quiet: bool,
    **criteria: float | None,
) -> int:
    """ADAPTER as another kind, of fewer ranks or in another format, in the directory OUT, with the error of this.

    LoRA to DoRA is exact, and so is D2-LoRA to DoRA on its axis. Others are the nearest that the rank allows: the
    error is of the whole delta, measured on what is written, by module. With --rescale-base DoRA and D2-LoRA become
    a plain LoRA exactly, on the base that this writes.

    With --to and nothing else asked, the same adapter in another format: what it has no place for is refused.
    """
    surgical.require_new(out)
    weights = BaseWeights(base) if base is not None else None
    checkpoint = measured.open_adapter(adapter, weights, scale=scale, alpha=alpha)
    asked = (kind, rank, max_error, budget, compat, along, tau, rescale_base, *criteria.values())
    if form is not None and asked.count(None) == len(asked):
        formats.rewrite(checkpoint, out, form, per_layer=per_layer, as_json=as_json, quiet=quiet)
        return 0
    keep = surgical.keep_of(rank, criteria, extra=compat == "kohya")
    if rescale_base is not None:
        if kind not in (None, "lora") or weights is None:
            raise refuse("USAGE", "--rescale-base makes a LoRA", wanted="--base, and no other --kind", got=str(kind))
        made, certificate = rescale(checkpoint, weights, rescale_base)
    else:
        ranks = keep if budget is None else spread(checkpoint, budget // 4, weights)
        with progress_bar("converting", show=not (as_json or quiet), unit=" modules") as progress:
            made, certificate = convert(
                checkpoint,
                kind,
                weights,
                keep=ranks,
                max_error=max_error,
                along=along,
                tau=tau,
                progress=progress,
            )
    beside = surgical.write(made, out, checkpoint, form or "peft")
    surgical.show(
        made, certificate, out, per_layer=per_layer, as_json=as_json, quiet=quiet, tokenizer=beside,
        rescaled_base=None if rescale_base is None else str(rescale_base),
    )  # fmt: skip
    return 0
