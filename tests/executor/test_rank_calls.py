from __future__ import annotations

from typing import Any

import pytest

from rayllm.executor import rank_calls
from rayllm.executor.rank_calls import watch_nodes


class _Links:
    """Closed after so many looks."""

    def __init__(self, num_looks: int):
        self._num_looks = num_looks
        self.told: list[tuple[int, str]] = []

    @property
    def is_closed(self) -> bool:
        self._num_looks -= 1
        return self._num_looks < 0

    def report_loss(self, rank: int, reason: str) -> None:
        self.told.append((rank, reason))


class _Bundles:
    def __init__(self, looks: list[Any]):
        self.looks = looks

    def on_lost_nodes(self, ranks: list[int]) -> dict[int, str]:
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return {rank: look for rank in ranks if look}


def test_a_lost_node_is_told_for_each_of_its_ranks_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_calls, "_NODE_LOOK_S", 0.0)
    links: Any = _Links(9)
    bundles: Any = _Bundles(["", RuntimeError("GCS"), "", "node 1 is lost", "never asked"])
    watch_nodes(bundles, [0, 2], links)
    assert links.told == [(0, "node 1 is lost"), (2, "node 1 is lost")]
    assert bundles.looks == ["never asked"]


def test_closed_links_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_calls, "_NODE_LOOK_S", 0.0)
    links: Any = _Links(3)
    watch_nodes(_Bundles([""] * 3), [0], links)  # type: ignore[arg-type]
    assert links.told == []
