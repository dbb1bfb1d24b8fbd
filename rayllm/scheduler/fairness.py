"""Whose turn it is among the sequences that wait, when several clients want more than there is.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from rayllm.scheduler.queue import ServiceQueue
from rayllm.scheduler.sequence import Sequence, Status

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2  # the paper's: a token that is sampled costs a step, one of a prompt a share of it


class ServiceCounters:
    """How much each client has been served: a weighted count of prompt and output tokens.

    A client is active while it has unfinished sequences. One that becomes active starts no lower than the
    least served active one: what it did not ask for while it was away gives no claim now. When none is
    active, all is forgotten.
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_open: dict[str, int] = {}

    def __getitem__(self, client: str) -> int:
        return self._served[client]

    def enter(self, client: str) -> None:
        """One more unfinished sequence of `client`."""
        if client not in self._num_open:
            least = min((self._served[other] for other in self._num_open), default=0)
            if len(self._served) > 2 * len(self._num_open) + 64:  # who is at the least or below need not be known
                self._served = {c: s for c, s in self._served.items() if s > least or c in self._num_open}
            self._served[client] = max(least, self._served.get(client, 0))
        self._num_open[client] = self._num_open.get(client, 0) + 1

    def leave(self, client: str) -> None:
        """One less."""
        self._num_open[client] -= 1
        if not self._num_open[client]:
            del self._num_open[client]
            if not self._num_open:
                self._served.clear()

    def charge(self, client: str, num_weighted_tokens: int) -> None:
        """An active client was served."""
        self._served[client] += num_weighted_tokens

    def check(self, sequences: list[Sequence]) -> None:
        """`AssertionError` unless the active clients are those of the unfinished `sequences`."""
        clients = [sequence.client for sequence in sequences]
        assert self._num_open == {client: clients.count(client) for client in clients}, "active clients differ"
        assert self._num_open.keys() <= self._served.keys(), "an active client has no counter"
        assert clients or not self._served, "no one is active, and counters are kept"


@dataclass(eq=False)
class Backlog:
    """What one client has waiting at one priority, served in order of arrival; exists while something waits."""

    num_tokens: int = 0
    """Prompt tokens that wait."""
    num_max_tokens: int = 0
    """Tokens that those which wait may have."""
    num_started_tokens: int = 0
    """Those that came to run out of it."""


class FairQueue:
    """The waiting sequences. First is the lowest priority number; among equal ones a sequence that `goes_first`, then
    the client that was served least; of one client, the earliest arrival. So with one client it is priority, then
    arrival.

    Finding the first takes time proportional to the clients that wait.
    """

    def __init__(self, counters: ServiceCounters):
        self._counters = counters
        self._by_client: dict[str, ServiceQueue] = {}
        self._backlogs: dict[tuple[str, int], Backlog] = {}  # by client and priority
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        """All, in order of service as it stands."""
        return iter(sorted((s for queue in self._by_client.values() for s in queue), key=self._key))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(backlog.num_tokens for backlog in self._backlogs.values())

    def backlog(self, client: str, priority: int) -> Backlog | None:
        return self._backlogs.get((client, priority))

    def add(self, sequence: Sequence) -> None:
        self._by_client.setdefault(sequence.client, ServiceQueue()).add(sequence)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """`ValueError` where it is not in the queue."""
        queue = self._by_client.get(sequence.client)
        if queue is None:
            raise ValueError(f"{sequence} is not in the queue")
        queue.remove(sequence)
        self._count(sequence, -1)
        if not queue:
            del self._by_client[sequence.client]

    def _count(self, sequence: Sequence, sign: int) -> None:
        self._len += sign
        key = sequence.client, sequence.priority
        backlog = self._backlogs.setdefault(key, Backlog())
        backlog.num_tokens += sign * sequence.num_prompt_tokens
        backlog.num_max_tokens += sign * (sequence.max_length - sequence.num_prompt_tokens)
        if not backlog.num_tokens:
            del self._backlogs[key]

    def note_start(self, sequence: Sequence) -> None:
        """It is about to be removed because it comes to run."""
        self._backlogs[sequence.client, sequence.priority].num_started_tokens += sequence.num_prompt_tokens

    def walk(self) -> Iterator[Sequence]:
        """Each in its turn, by the counters as they are when it is asked for. Between two, the caller may let
        the one that it got run or leave it, charge its client, and add ones of higher priority number."""
        num_passed: dict[str, int] = {}
        while True:
            heads = [
                queue[num_passed.get(client, 0)]
                for client, queue in self._by_client.items()
                if num_passed.get(client, 0) < len(queue)
            ]
            if not heads:
                return
            first = heads[0] if len(heads) == 1 else min(heads, key=self._key)
            yield first
            if first.status is Status.WAITING:
                num_passed[first.client] = num_passed.get(first.client, 0) + 1

    def _key(self, sequence: Sequence) -> tuple[int, int, tuple[int, int]]:
        num_served = -1 if sequence.goes_first else self._counters[sequence.client]
        return sequence.priority, num_served, sequence.order

    def num_tokens_ahead(self, client: str, priority: int, num_prompt_tokens: int) -> int:
        """Prompt tokens that will be served before a sequence that comes now: those of lower priority number,
        those of the same client, and of each other client as many as are served while those are."""
        return self._num_ahead(client, priority, num_prompt_tokens, attrgetter("num_tokens"))

    def num_max_tokens_ahead(self, client: str, priority: int, num_max_tokens: int) -> int:
        """The same of the tokens that those which wait may have, for one that may have `num_max_tokens`."""
        return self._num_ahead(client, priority, num_max_tokens, attrgetter("num_max_tokens"))

    def _num_ahead(self, client: str, priority: int, num_own: int, amount: Callable[[Backlog], int]) -> int:
        backlog = self.backlog(client, priority)
        own = amount(backlog) if backlog is not None else 0
        ahead = 0
        for (other, other_priority), backlog in self._backlogs.items():
            if other_priority < priority or (other == client and other_priority == priority):
                ahead += amount(backlog)
            elif other_priority == priority:
                ahead += min(amount(backlog), own + num_own)
        return ahead

    def num_clients_with(self, client: str) -> int:
        """Clients that wait, `client` counted in any case."""
        return len(self._by_client) + (client not in self._by_client)

    def num_waiting_of(self, client: str) -> tuple[int, int]:
        """Sequences of `client`, and their prompt tokens."""
        num_tokens = sum(backlog.num_tokens for (other, _), backlog in self._backlogs.items() if other == client)
        return len(self._by_client.get(client, ())), num_tokens

    def check(self) -> None:
        for client, queue in self._by_client.items():
            assert queue, f"an empty queue is kept for {client!r}"
            assert all(sequence.client == client for sequence in queue)
            queue.check()
        assert self._len == sum(map(len, self._by_client.values())), "the count of the waiting is wrong"
        counted: dict[tuple[str, int], int] = {}
        for sequence in self:
            key = sequence.client, sequence.priority
            counted[key] = counted.get(key, 0) + sequence.num_prompt_tokens
        assert counted == {key: backlog.num_tokens for key, backlog in self._backlogs.items()}, (
            "the count of waiting tokens is wrong"
        )
