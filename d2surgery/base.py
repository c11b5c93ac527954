"""BaseWeights: the tensors of a model directory, read by row ranges with pread, never held or mapped."""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from d2surgery.errors import refuse
from d2surgery.header import Header, read_checkpoint_header, read_json
from d2surgery.tensors import read_tensor


class BaseWeights(Mapping[str, Tensor]):
    """A Hugging Face model directory of safetensors. Each access reads one tensor; `header` has names and shapes.

    Raises D2SurgeryError BAD_BASE, MISSING_SHARD or what read_header raises.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise refuse("BAD_BASE", "not a directory", file=str(directory))
        self.header: Header = read_checkpoint_header(self.directory)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; {} when there is none."""
        path = self.directory / "config.json"
        return read_json(path) if path.exists() else {}

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.header.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)
