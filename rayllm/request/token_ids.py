"""Token ids, block ids and row numbers in the form in which they travel."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids (or block ids, or row numbers) as little-endian int32: how they travel and how they are hashed."""
    return array("i", ids).tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """The inverse of `pack_ids`, as an `array('i')`."""
    ids = array("i")
    ids.frombytes(packed)
    return ids
