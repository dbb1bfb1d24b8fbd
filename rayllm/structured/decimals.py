"""The patterns that Pydantic (2.11 and 2.12) writes for decimals, without their look-around."""

from __future__ import annotations

import re

_START = re.escape(r"^(?!^[-+.]*$)[+-]?0*")
_ANY = re.compile(_START + re.escape(r"\d*\.?\d*$"))
_PLACES = re.compile(_START + re.escape(r"\d*\.?\d{0,") + r"(\d{1,3})" + re.escape("}0*$"))
_DIGITS = re.compile(
    _START + re.escape(r"(?:\d{0,") + r"(\d{1,3})" + re.escape(r"}|(?=[\d.]{1,") + r"\d{1,3}" + re.escape(r"}0*$)")
    + re.escape(r"\d*\.\d*0*$)")
)  # fmt: skip
_BOTH = re.compile(
    _START + re.escape(r"(?:\d{0,") + r"(\d{1,3})" + re.escape(r"}|(?=[\d.]{1,") + r"\d{1,3}" + re.escape(r"}0*$)\d{0,")
    + r"\d{1,3}" + re.escape(r"}\.\d{0,") + r"(\d{1,3})" + re.escape(r"}0*$)")
)  # fmt: skip
_MAX_DIGITS = 100


def decimal_pattern(pattern: str) -> str | None:
    """A pattern that llguidance can follow, and of which every match is a match of the one given; None for a pattern
    that is not one of Pydantic's."""
    if _ANY.fullmatch(pattern):
        return r"^[+-]?(\d+\.?\d*|\.\d+)$"
    if found := _PLACES.fullmatch(pattern):
        return rf"^[+-]?\d+{_fraction(int(found[1]))}$"
    if found := _BOTH.fullmatch(pattern):
        return rf"^[+-]?{_whole(int(found[1]))}{_fraction(int(found[2]))}$"
    if (found := _DIGITS.fullmatch(pattern)) and 0 < (num_digits := int(found[1])) <= _MAX_DIGITS:
        splits = (rf"\d{{1,{whole}}}{_fraction(num_digits - whole)}" for whole in range(1, num_digits + 1))
        return rf"^[+-]?({'|'.join(splits)})$"
    return None


def _whole(num_digits: int) -> str:
    return rf"\d{{1,{num_digits}}}" if num_digits else "0"


def _fraction(num_digits: int) -> str:
    return rf"(\.\d{{1,{num_digits}}})?" if num_digits else ""
