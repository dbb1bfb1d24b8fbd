"""Checks that a field holds a number in its range; the error names the field, the value and the range."""

from __future__ import annotations

import math
from typing import Any

MAX_INT32 = 2**31 - 1


def check_number(name: str, value: Any, low: float, high: float, *, low_open: bool = False, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    inside = (low < value if low_open else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value!r} is outside {bracket}{low:g}, {high:g}]{hint}")


def check_int(name: str, value: Any, low: int, high: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}]{hint}")
