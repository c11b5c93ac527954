"""The section of the report on what an adapter was made of and what that lost: from the header of its own file."""

from collections.abc import Iterator, Sequence

from d2surgery.reporting.figures.losses import error_curves, error_map
from d2surgery.reporting.pages.parts import Figures, joined, monospace, number_cell, safe, table, text_cell
from d2surgery.surgery.provenance import Step, losses_of


def surgery_section(label: str, steps: Sequence[Step], figures: Figures) -> Iterator[str]:
    """Nothing where the file tells of no surgery."""
    if not steps:
        return
    yield f"<h2>What made {safe(label)}</h2><ol>{''.join(f'<li>{_step(step)}</li>' for step in steps)}</ol>"
    losses = losses_of(steps[-1])
    if not losses:
        return
    yield figures.add(error_map(losses))
    if any(len(loss.curve) > 1 for loss in losses.values()):
        yield figures.add(error_curves(losses))
    heads = ["module", "rank", "error", "error in σ₁", "energy kept", "error in outputs", "‖delta‖F"]
    lines = [
        [
            text_cell(module),
            number_cell(loss.rank),
            *(number_cell(value, percent=True) for value in (loss.relative_error, loss.spectral_error)),
            *(number_cell(value, percent=True) for value in (loss.energy_kept, loss.weighted_error)),
            number_cell(loss.norm),
        ]
        for module, loss in losses.items()
    ]
    yield table(heads, lines, words=1, sortable=True)


def _step(step: Step) -> str:
    inputs = step.get("inputs")
    files = [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    named = [
        (entry.get("what"), f"{monospace(str(entry.get('file')))} {safe(str(entry.get('sha256'))[:8])}")
        for entry in files
    ]
    of, on = (joined([name for what, name in named if (what == "base") is is_base]) for is_base in (False, True))
    error = step.get("relative_error")
    said = "exact" if step.get("exact") else f"error {100 * error:.3g} %" if isinstance(error, int | float) else ""
    by = safe(str(step.get("d2surgery")))
    where = f"{f' of {of}' if of else ''}{f' on {on}' if on else ''}"
    return f"<b>{safe(str(step.get('method')))}</b>{where}: {said}, by d2surgery {by}"
