"""What do adapters that others trained and published look like?

python analyses/real_adapters/study.py ADAPTER … [--base DIR]
python analyses/real_adapters/study.py --tiny
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch
from safetensors.torch import save_file

import d2surgery

sys.path.insert(0, str(Path(__file__).parents[1]))
from studying import machine, sha256, versions, write

HERE = Path(__file__).resolve().parent
SEED = 0
QUESTION = "What do adapters that others trained and published look like?"


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("adapters", nargs="*", type=Path)
    parser.add_argument("--base", type=Path, help="of those adapters that fit it")
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    parser.add_argument("--tiny", action="store_true", help="random adapters; the numbers mean nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if options.tiny:
            options.adapters, options.base = tiny(Path(work))
        if not options.adapters:
            parser.error("some adapters, or --tiny")
        results = study(options.adapters, options.base)
    write(results, options.results)
    print(table(results))


def study(adapters: list[Path], base: Path | None) -> dict[str, Any]:
    """The whole of results.json."""
    alone, refused = {}, {}
    for path in adapters:
        try:
            alone[path] = by_itself(path)
        except d2surgery.D2SurgeryError as error:
            refused[path.name] = error.problems[0].code
    on_base = [one for path in alone if base and (one := onto(base, path))]
    return {
        "question": QUESTION,
        "machine": machine(),
        "versions": versions("safetensors"),
        "seed": SEED,
        "inputs_sha256": {path.name: sha256(weights(path)) for path in adapters},
        "adapters": list(alone.values()),
        "refused": refused,
        "on_base": {"base": base.name if base else "", "rows": on_base},
        "pairs": list(pairs([path for path in alone if any(one["adapter"] == path.name for one in on_base)])),
    }


# One adapter ----------------------------------------------------------------------------------------------------------


def by_itself(path: Path) -> dict[str, Any]:
    """What its file says without a base. Of numbers that differ by module: the median, and the quartiles around it."""
    layout, rows = d2surgery.inspect(path).layout, d2surgery.spectrum(path).rows()
    types = {row["type"] for row in rows}
    size = {kind: mean(row["rms_entry"] for row in rows if row["type"] == kind) for kind in types}
    entries = layout.adapters.values()
    return {
        "adapter": path.name,
        "format": layout.format,
        "modules": len(rows),
        "rank": " ".join(map(str, sorted({sum(entry.ranks.values()) for entry in entries}))),
        "scaling": " ".join(f"{scaling:g}" for scaling in sorted({entry.scaling or 0.0 for entry in entries})),
        "dtype": " ".join(sorted({entry.dtype for entry in entries})),
        "replaced": len(layout.replacements),
        "energy_entropy_rank": middle(row["energy_entropy_rank"] for row in rows),
        "half_is_enough": mean(row["energy_rank_90"] <= row["nominal_rank"] / 2 for row in rows),
        "rms_entry": middle(row["rms_entry"] for row in rows),
        "strongest": max(size, key=size.__getitem__).rpartition(".")[2],
        "strongest_over_weakest": max(size.values()) / min(size.values()) if min(size.values()) else 0.0,
        "zero": sum(row["frobenius_norm"] == 0 for row in rows),
    }


def middle(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile over the modules."""
    held = list(values)
    return quantiles(held, n=4, method="inclusive") if len(held) > 1 else held * 3


def weights(path: Path) -> Path:
    """The file that holds them, whatever it is called."""
    inside = [] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("adapter_*"))
    return inside[0] if inside else path


# On its base, and beside another --------------------------------------------------------------------------------------


def onto(base: Path, path: Path) -> dict[str, Any] | None:
    """How far it moves the base and what bfloat16 keeps of it; None where it is no adapter of this base."""
    try:
        plan = d2surgery.plan(base, path, "nothing-is-written")
    except d2surgery.D2SurgeryError:
        return None
    moved = d2surgery.drift(path, base).rows()
    kept = [by_dtype["BF16"] for by_dtype in plan.survival.values()]
    return {
        "adapter": path.name,
        "relative_update": middle(row["relative_update"] for row in moved),
        "delta_magnitude": middle(row["delta_magnitude"] for row in moved),
        "delta_direction": middle(row["delta_direction"] for row in moved),
        "bf16_gain": middle(one.gain for one in kept),
        "bf16_error": middle(one.relative_error for one in kept),
        "bf16_changed": middle(one.changed_share for one in kept),
    }


def pairs(paths: list[Path]) -> Iterable[dict[str, Any]]:
    """Every two of them, by module."""
    rows = d2surgery.diff(*paths).rows() if len(paths) > 1 else []
    for first, second in dict.fromkeys((row["first"], row["second"]) for row in rows):
        both = [row for row in rows if (row["first"], row["second"]) == (first, second)]
        names = ("cosine", "phi_in_features", "phi_out_features")
        yield {"first": first, "second": second} | {name: middle(row[name] for row in both) for name in names}


# What is said ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    lines = [
        "| adapter | modules | rank | used rank | half the rank holds 90 % | size of an entry | strongest | zero |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results["adapters"]:
        lines.append(
            f"| {one['adapter']} | {one['modules']} | {one['rank']} | {spread(one['energy_entropy_rank'], '.2f')} "
            f"| {one['half_is_enough']:.0%} of modules | {spread(one['rms_entry'], '.2g')} "
            f"| {one['strongest']}, {one['strongest_over_weakest']:.3g} × the weakest | {one['zero']} |"
        )
    lines += [f"| {name} | refused: {code} | | | | | | |" for name, code in results["refused"].items()]
    lines += ["", "| on the base | update ÷ base | change of length | change of direction | bf16 keeps | bf16 errs by "
              "| elements that bf16 changes |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in results["on_base"]["rows"]:
        lines.append(
            f"| {one['adapter']} | {spread(one['relative_update'], '.2%')} | {spread(one['delta_magnitude'], '.2g')} "
            f"| {spread(one['delta_direction'], '.2g')} | {spread(one['bf16_gain'], '.3f')} "
            f"| {spread(one['bf16_error'], '.0%')} | {spread(one['bf16_changed'], '.0%')} |"
        )
    lines += ["", "| two of them | cosine of the deltas | shared input directions | shared output directions |",
              "|---|---|---|---|"]  # fmt: skip
    for one in results["pairs"]:
        numbers = (spread(one[name], ".3f") for name in ("cosine", "phi_in_features", "phi_out_features"))
        lines.append(f"| {one['first']}, {one['second']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def spread(quartiles: list[float], form: str) -> str:
    low, median, high = (format(value, form) for value in quartiles)
    return f"{median} ({low} to {high})"


# Tiny -----------------------------------------------------------------------------------------------------------------


def tiny(work: Path) -> tuple[list[Path], Path]:
    torch.manual_seed(SEED)
    names = [f"model.layers.{layer}.self_attn.{leaf}" for layer in range(2) for leaf in ("q_proj", "v_proj")]
    (work / "base").mkdir()
    save_file({f"{name}.weight": torch.randn(12, 8) for name in names}, work / "base/model.safetensors")
    (work / "base/config.json").write_text("{}")
    for one in ("one", "another"):
        factors = {name: d2surgery.LoRA(A=torch.randn(2, 8), B=torch.randn(12, 2), scaling=0.01) for name in names}
        d2surgery.save(d2surgery.from_adapters(factors), work / one)
    return [work / "one", work / "another"], work / "base"


if __name__ == "__main__":
    main()
