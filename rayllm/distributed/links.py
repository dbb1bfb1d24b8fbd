"""The links between ranks as they were measured: plain data, without torch, for the driver and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What `rank` saw of its exchange with `peer`."""

    rank: int
    peer: int
    latency_us: float = 0.0
    """The fastest exchange of 8 bytes in both directions at once."""
    gigabytes_per_s: float = 0.0
    """The same of a large message, per direction."""
    problem: str = ""
    """What was wrong, else empty."""


def opponents(rank: int, size: int) -> list[int | None]:
    """Whom a rank meets in each round, so that each pair meets once and no rank waits for two at a time: a round-robin
    tournament by the circle method. None: nobody."""
    num_rounds = size - 1 + size % 2
    met: list[int | None] = []
    for number in range(num_rounds):
        opponent = number if rank == num_rounds else (2 * number - rank) % num_rounds
        if opponent == rank:
            opponent = num_rounds  # the one that stays in its place
        met.append(opponent if opponent < size else None)
    return met


def bad_links(links: Sequence[Link], name: Callable[[int], str]) -> list[str]:
    """A line for each pair with a problem. `name` says where a rank lives."""
    problems: dict[tuple[int, int], list[str]] = {}
    for link in links:
        if link.problem:
            pair = min(link.rank, link.peer), max(link.rank, link.peer)
            problems.setdefault(pair, []).append(f"rank {link.rank} {link.problem}")
    return [f"{name(a)} and {name(b)}: {', '.join(seen)}" for (a, b), seen in sorted(problems.items())]


def summary(links: Sequence[Link]) -> str:
    """The slowest and the fastest of good links, in one line."""
    latencies, rates = [link.latency_us for link in links], [link.gigabytes_per_s for link in links]
    num_pairs = len({frozenset((link.rank, link.peer)) for link in links})
    return (
        f"{num_pairs} links between ranks: {min(latencies):.0f}-{max(latencies):.0f} us, "
        f"{min(rates):.3g}-{max(rates):.3g} GB/s"
    )
