"""What a format is: a module of functions. `formats.FORMATS` lists them in the order of detection."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from d2surgery.errors import refuse
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.layout import Layout, Stored

if TYPE_CHECKING:  # describing a file needs neither
    from torch import Tensor

    from d2surgery.adapters import Adapter

Values = Callable[[str], tuple[float, ...]]
"""The numbers of a small tensor by its key, such as an alpha that is stored in the file."""


class Holding(Protocol):
    """What a writer is given: a layout with its tensors."""

    @property
    def layout(self) -> Layout: ...

    def tensor(self, key: str) -> "Tensor": ...

    def adapter(self, module: str, expert: int = 0) -> "Adapter": ...

    def bias(self, module: str) -> "Tensor": ...


class Format(Protocol):
    """One way in which adapters lie on disk."""

    NAME: str  # what `save(…, format=NAME)` and `convert --to` call it
    TITLE: str  # what people call it
    READS: str  # what of it is read, in words

    def recognise(self, header: Header, config: Mapping[str, Any] | None) -> str:
        """Why the file is of this format, by its keys and the config beside it; "" where it is not."""

    def layout(self, header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
        """The layout of a file that was recognised: every tensor in one place, every misfit in `problems`."""

    def with_base(self, layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
        """A layout of this format with what its base's tensors and config say beside the file, such as how many heads
        share rows; `as_read` where that is nothing."""

    def holds(self, kind: str) -> frozenset[Stored]:
        """On which modules the format can write adapters of a kind; empty where it cannot."""

    def write(self, checkpoint: Holding, directory: Path) -> None:
        """Write the files. Raises FORMAT_CANNOT_HOLD before anything is written."""


def as_read(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """The layout: its file says all that its base could."""
    return layout


def holds_nothing(kind: str) -> frozenset[Stored]:
    """Of a format that is only read."""
    return frozenset()


def not_written(checkpoint: Holding, directory: Path) -> None:
    raise refuse("USAGE", "the format is read only: not one that can be written")
