"""Records as the values that JSON has."""

import json
from dataclasses import dataclass
from math import inf, nan
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from d2surgery.files.plain import plain


class Point(NamedTuple):
    x: float
    y: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    name: str
    point: Point
    inner: Any = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (True, True),
        ("text", "text"),
        (None, None),
        (0.5, 0.5),
        (nan, None),
        (-inf, None),
        ((1, [nan, 2.0]), [1, [None, 2.0]]),
        ({"a": {"b": inf}}, {"a": {"b": None}}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (torch.tensor([[1.0, nan], [2.0, 3.0]]), [[1.0, None], [2.0, 3.0]]),
        (torch.tensor(2), 2),
        (Point(nan, (1.0,)), {"x": None, "y": [1.0]}),
        (Record("n", Point(1.0, ())), {"name": "n", "point": {"x": 1.0, "y": []}, "inner": None}),
        (Record("n", Point(1.0, ()), (Record("m", Point(nan, ())),)),
         {"name": "n", "point": {"x": 1.0, "y": []},
          "inner": [{"name": "m", "point": {"x": None, "y": []}, "inner": None}]}),
    ],
)  # fmt: skip
def test_a_value_as_json_has_it(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected
