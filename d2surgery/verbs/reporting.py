"""`d2surgery.report`: one HTML page that says what adapters do."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.auditing import audit
from d2surgery.auditing.findings import Audit
from d2surgery.errors import refuse
from d2surgery.files.whole import require_folder, write_whole
from d2surgery.formats import open_layout
from d2surgery.machine import uncollected

if TYPE_CHECKING:
    from d2surgery.surveying.adapter import Named


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report:
    """A page that works offline; in a notebook it is shown as it is."""

    adapters: tuple[str, ...]
    html: str
    audit: Audit | None = None
    """Of the merged checkpoint, where one was given."""

    def __repr__(self) -> str:
        audited = f", audit {self.audit.verdict}" if self.audit else ""
        return f"Report({len(self.adapters)} adapters, {len(self.html) / 1e6:.1f} MB{audited})"

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" width="100%" height="700" style="border:0"></iframe>'

    def save(self, out: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Raises D2SurgeryError FILE_MISSING for a folder that is not there, OUTPUT_EXISTS for a file that is."""
        path = Path(out)
        check_page(path, force=force)
        write_whole(path, self.html)
        return path


def report(
    *adapters: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    merged: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: "Named" = lambda label: lambda done, total: None,
    **choices: Any,
) -> Report:
    """The page of one or more adapters; with a base also how far each moves it, with a merged checkpoint its audit.

    out: written there, too; nothing is written over without `force`. `choices` as `survey` takes them: method, cache,
    with_intruders, exact_signs. Raises D2SurgeryError for what the adapters and the base are refused for.
    """
    if not adapters:
        raise refuse("USAGE", "a report needs an adapter", wanted="one or more", got="none")
    if merged is not None and (base is None or len(adapters) != 1):
        raise refuse("USAGE", "an audit needs the base and one adapter", wanted="--base, --merged and one ADAPTER")
    if out is not None:
        check_page(Path(out), force=force)
    names = tuple(os.fspath(adapter) for adapter in adapters)
    for name in names:
        open_layout(name)  # what cannot be read is refused before torch is imported
    with uncollected():
        from d2surgery.surveying.adapter import survey
        from d2surgery.training.disk import read_metrics

    found = survey(names, base=None if base is None else os.fspath(base), progress=progress, **choices)
    audited = None
    if base is not None and merged is not None:
        audited = audit(base, names[0], merged, progress=progress("audit"))
    from d2surgery.reporting.pages.report import report_page  # plotly, which is not needed to import this

    logs = {m.label: read_metrics(m.layout.path.parent) for m in found.measured}
    runs = {label: lines for label, lines in logs.items() if lines}
    page = Report(adapters=names, html=report_page(found, audited, runs), audit=audited)
    if out is not None:
        page.save(out, force=force)
    return page


def check_page(path: Path, *, force: bool) -> None:
    """Before any work: whether the page can be written."""
    require_folder(path)
    if path.exists() and not force:
        raise refuse("OUTPUT_EXISTS", "something is there already; --force writes over it", file=str(path))
