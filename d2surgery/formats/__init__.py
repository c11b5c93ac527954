"""The formats, in the order of detection: one module each, with `layout(header, config) -> Layout | None`."""

from collections.abc import Mapping
from typing import Any

from d2surgery.formats import foreign, peft
from d2surgery.header import Header
from d2surgery.layout import Layout


def layout(header: Header, config: Mapping[str, Any] | None) -> Layout:
    """The layout by the first format that recognises the file; `foreign`, the last, recognises every file."""
    return peft.layout(header, config) or foreign.layout(header, config)
