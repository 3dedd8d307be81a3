"""The axis of rows that the places of a sequence or a map lie along, named as torch names it.

(batch, 20, D) laid out as rows:  (20*batch, D)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["elements_per_row", "row_axis"]

_PRODUCT = re.compile(r"([1-9]\d{0,17})\*(\w+)")


def row_axis(places: Sequence[int | str]) -> str:
    """The axis that holds all of `places`, one of which is symbolic."""
    (symbol,) = (axis for axis in places if isinstance(axis, str))
    product = _PRODUCT.fullmatch(symbol)
    count = math.prod(axis for axis in places if isinstance(axis, int)) * elements_per_row(symbol)
    name = symbol if product is None else product[2]
    return name if count == 1 else f"{count}*{name}"


def elements_per_row(axis: int | str) -> int:
    """How long an axis is for one row of the batch: 20 of `20*batch`, 1 of any other symbol."""
    if isinstance(axis, int):
        return axis
    product = _PRODUCT.fullmatch(axis)
    return 1 if product is None else int(product[1])
