from __future__ import annotations

import pytest

from rayllm.distributed.links import Link, bad_links, opponents, summary


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_each_pair_meets_once_and_nobody_meets_two_at_a_time(size: int) -> None:
    rounds = list(zip(*(opponents(rank, size) for rank in range(size)), strict=True))
    pairs = []
    for met in rounds:
        for rank, peer in enumerate(met):
            if peer is not None:
                assert met[peer] == rank
                pairs.append((rank, peer))
    assert len(rounds) == size - 1 + size % 2
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(size) if a != b]


def test_a_pair_with_a_problem_is_named_once_with_what_each_end_saw() -> None:
    links = [Link(2, 0, problem="failed: reset"), Link(1, 3, 5.0, 2.0), Link(0, 2, problem="got no answer within 5 s")]
    assert bad_links(links, lambda rank: f"<{rank}>") == [
        "<0> and <2>: rank 2 failed: reset, rank 0 got no answer within 5 s"
    ]
    assert bad_links([Link(0, 1, 5.0, 2.0)], str) == []


def test_good_links_are_summed_up() -> None:
    links = [Link(0, 1, 5.4, 2.04), Link(1, 0, 7.0, 2.5), Link(2, 0, 60.0, 0.125)]
    assert summary(links) == "2 links between ranks: 5-60 us, 0.125-2.5 GB/s"
