"""The formats, in the order of detection: one module each, with `layout(header, config) -> Layout | None`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2surgery.files.header import Header, is_pickle, read_header, read_json
from d2surgery.files.locate import PICKLES, locate
from d2surgery.formats import foreign, peft
from d2surgery.formats.layout import Layout


def open_layout(adapter: str | os.PathLike[str]) -> Layout:
    """What the adapter at a path or hub id holds, by names and shapes; its misfits stand in `problems`.

    Raises D2SurgeryError where nothing can be said of it: no such file, a file that is not what it should be.
    """
    files = locate(adapter)
    return layout(_header(files.weights), read_json(files.config) if files.config else None)


def layout(header: Header, config: Mapping[str, Any] | None) -> Layout:
    """The layout by the first format that recognises the file; `foreign`, the last, recognises every file."""
    return peft.layout(header, config) or foreign.layout(header, config)


def _header(weights: Path) -> Header:
    if weights.suffix in PICKLES and is_pickle(weights):
        from d2surgery.files.pickled import read_pickled_header  # torch, and only here

        return read_pickled_header(weights)
    return read_header(weights)
