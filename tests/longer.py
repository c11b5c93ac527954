"""What every run takes of a test's many values; `pytest -m ''` takes the others too."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(step: int, values: Iterable[Any]) -> list[Any]:
    """Values of one parameter: the first and every so-manieth after it as they are, the others as long tests."""
    return [
        value if number % step == 0 else pytest.param(value, marks=pytest.mark.long)
        for number, value in enumerate(values)
    ]
