from __future__ import annotations

from rayllm.request import pack_ids, unpack_ids


def test_ids_survive_packing() -> None:
    assert list(unpack_ids(pack_ids([0, 5, 2**31 - 1]))) == [0, 5, 2**31 - 1]
