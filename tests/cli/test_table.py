"""Columns, durations and sizes for a person."""

from __future__ import annotations

import pytest

from rayllm.cli.table import amount, span, table


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    shown = table(("name", "state"), [("a", "ready"), ("longer", "")])
    assert shown.split("\n") == ["NAME    STATE", "a       ready", "longer"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(("name", "state"), [("a",)])


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h 0m"),
        (12_000, "3h 20m"),
        (86_400, "1d 0h"),
        (187_200, "2d 4h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3.2 * 2**20, "3.2 MiB"),
        (2**30, "1.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes(num_bytes: float, shown: str) -> None:
    assert amount(num_bytes) == shown
