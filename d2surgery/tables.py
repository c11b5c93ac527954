"""What results have in common: rows, shown as a table in a notebook and handed to pandas where it is installed."""

from collections.abc import Sequence
from html import escape
from math import isfinite
from typing import Any

from d2surgery.errors import refuse

MOST_ROWS = 60  # in a notebook; `rows` and `to_frame` have all


class Tabular:
    """A result that is a table: `rows()` gives a mapping per line, all with the same keys."""

    def rows(self) -> Sequence[dict[str, Any]]:
        raise NotImplementedError

    def to_frame(self) -> Any:
        """A pandas DataFrame of the rows. Raises D2SurgeryError NO_PANDAS where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise refuse("NO_PANDAS", "the Python package pandas is not installed") from None
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        rows = self.rows()
        heads = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else {}))
        lines = "".join(
            f"<tr>{''.join(f'<td>{escape(_shown(cell))}</td>' for cell in row.values())}</tr>"
            for row in rows[:MOST_ROWS]
        )
        more = f"<p>… {len(rows) - MOST_ROWS} more rows: to_frame() has all.</p>" if len(rows) > MOST_ROWS else ""
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>" if rows else ""
        return f"<p>{escape(repr(self))}</p>{table}{more}"


def _shown(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and not isfinite(cell)):
        return "–"
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
