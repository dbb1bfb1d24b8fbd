"""What the benchmarks share: flags that are counts, percentiles, and the frame that results are printed in."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayllm.cli.flags import Parser, UsageError, flag_name

_WIDTH = 50
_LABEL_WIDTH = 40


def add_count_flags(parser: Parser, flags: Iterable[tuple[str, int, str]]) -> None:
    """Integer flags by name, default and meaning."""
    for name, default, text in flags:
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")


def check_at_least(given: Mapping[str, Any], least: int, *names: str) -> None:
    """`UsageError` for a flag that is less."""
    for name in names:
        if given[name] < least:
            raise UsageError(f"{flag_name(name)} {given[name]} must be at least {least}")


def percentile(values: Sequence[float], percent: float) -> float:
    """Of values in any order, between two of them where it falls so; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread_ms(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and percentiles in milliseconds, named as vLLM's results are."""
    mean = statistics.fmean(seconds) if seconds else 0.0
    found = {f"mean_{name}_ms": mean, f"median_{name}_ms": percentile(seconds, 50)}
    found |= {f"p{percent}_{name}_ms": percentile(seconds, percent) for percent in (50, 90, 99)}
    return {key: round(1000 * value, 3) for key, value in found.items()}


def headline(text: str, fill: str = "=") -> str:
    return f"{f' {text} ' if fill == '=' and text else text:{fill}^{_WIDTH}}"


def line(label: str, value: float | str) -> str:
    """A label and its value, as vLLM prints them."""
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{_LABEL_WIDTH}} {shown:<{_WIDTH - _LABEL_WIDTH - 1}}".rstrip()
