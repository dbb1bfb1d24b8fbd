"""What `gpu.py` finds: rows with a value, its target and what came of it, as one table and as JSON."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure. A target is a bound from above or from below; without one, a row is no miss."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def is_miss(self) -> bool:
        """NaN is one wherever there is a target."""
        return (self.at_most is not None and not self.value <= self.at_most) or (
            self.at_least is not None and not self.value >= self.at_least
        )

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return "" if self.at_least is None else f"≥ {self.at_least:g}"


class OutOfTime(Exception):
    """A section has used the seconds that it has."""


@dataclass
class Report:
    """The rows of all sections, and the sections that failed. One section's failure leaves the others alone."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, section: str, budget_s: float, find: Callable[[], Iterator[Row]]) -> None:
        """Adds what `find` yields, and shows it as it comes. What was found before a failure stays."""
        print(f"\n{section} (at most {budget_s:.0f} s)", flush=True)
        rows = self.rows[section] = []
        began_s = time.perf_counter()
        try:
            with _at_most(budget_s):
                for row in find():
                    rows.append(row)
                    print(_line(row), flush=True)
        except Exception as error:
            self.failures[section] = _in_words(error)
            print(f"  FAILED: {self.failures[section]}", flush=True)
            if not isinstance(error, (ModuleNotFoundError, OutOfTime)):
                traceback.print_exc()
        self.seconds[section] = round(time.perf_counter() - began_s, 1)

    @property
    def misses(self) -> list[str]:
        return [f"{section}: {row.name}" for section, rows in self.rows.items() for row in rows if row.is_miss]

    def text(self) -> str:
        """The table of all rows, then misses and failures."""
        lines = [f"{'':<58} {'measured':>12} {'target':>12}"]
        for section, rows in self.rows.items():
            lines += ["", f"{section} ({self.seconds[section]:.0f} s)", *map(_line, rows)]
            if section in self.failures:
                lines.append(f"  FAILED: {self.failures[section]}")
        lines.append("")
        lines += [f"missed: {miss}" for miss in self.misses] or ["no target was missed"]
        lines += [f"failed: {section}: {reason}" for section, reason in self.failures.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        rows = {
            section: [{**asdict(row), "is_miss": row.is_miss} for row in found] for section, found in self.rows.items()
        }
        return {"rows": rows, "misses": self.misses, "failures": self.failures, "seconds": self.seconds}


def _line(row: Row) -> str:
    mark = "MISS" if row.is_miss else "ok" if row.target else ""
    return f"  {row.name:<56} {row.value:>12.4g} {row.target:>12} {row.unit:<8} {mark:<4} {row.note}".rstrip()


def _in_words(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is not installed: pip install {error.name}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def _at_most(budget_s: float) -> Iterator[None]:
    """Raises `OutOfTime` within, in Python code of the main thread, when the seconds are over."""

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime(f"not done within {budget_s:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, budget_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
