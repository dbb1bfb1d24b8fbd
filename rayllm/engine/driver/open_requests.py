"""The requests that a driver serves: whose they are, by which numbers clients know their choices, and what is to be
told of them. Plain Python; what happens to them, the loop decides."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from rayllm.engine.driver.retained_requests import RetainedRequest
from rayllm.messages import Deltas, DriverMessage, Times, TokenDelta
from rayllm.observability.trace import DriverSpans
from rayllm.scheduler.sequence import Sequence

Client = Hashable
Outbox = Callable[[Client, DriverMessage], None]


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that is being served, and where its choices' tokens go."""

    request_id: str
    """The loop's name for it, as its sequences carry it."""
    client: Client
    first_stream: int
    sequences: dict[int, Sequence]
    deadline_s: float | None
    arrived_at: float
    log_id: str
    spans: DriverSpans | None = None
    retained: RetainedRequest | None = None
    """Where it outlives its client."""
    unfinished: set[int] = field(default_factory=set)
    """The choices that its client waits for."""
    started_at: dict[int, float] = field(default_factory=dict)
    """Of each choice that is in plans and has no token yet."""
    num_faults: int = 0
    """Faults at which it was in a plan that was out."""
    num_survived_tokens: int = 0
    """Of all choices, since the last fault."""
    num_quarantine_releases: int = 0
    """Times that it was no longer suspected."""

    def __post_init__(self) -> None:
        self.unfinished.update(self.sequences)

    def stream(self, choice: int) -> int:
        return self.first_stream + choice

    @property
    def is_queued(self) -> bool:
        """Whether nothing of it was ever computed."""
        return all(sequence.row is None and not sequence.num_emitted for sequence in self.sequences.values())

    @property
    def max_tokens(self) -> int:
        return next(iter(self.sequences.values())).request.max_tokens

    @property
    def log_fields(self) -> dict[str, str]:
        """For `extra` of a line about it."""
        return {"request_id": self.log_id}

    def note_started(self, choice: int, now: float) -> None:
        """The choice came into a plan for the first time."""
        self.started_at[choice] = now
        if self.spans is not None:
            self.spans.started(now)

    def take_times(self, choice: int, now: float) -> Times | None:
        """What is said with the choice's first token, which came at `now`; None from then on."""
        started_at = self.started_at.pop(choice, None)
        if started_at is None:
            return None
        if self.spans is not None:
            self.spans.first_token(now)
        return Times(started_at - self.arrived_at, now - started_at)


class OpenRequests:
    """A request is open until each choice has been closed. What is told of it goes out with `flush`: one message a
    client, through `outbox`, which must not block.
    """

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._by_id: dict[str, OpenRequest] = {}
        self._by_stream: dict[tuple[Client, int], tuple[OpenRequest, int]] = {}
        self._with_deadline: dict[str, OpenRequest] = {}
        self._unsent: dict[Client, list[TokenDelta]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[OpenRequest]:
        """As they stand now: they may be closed meanwhile."""
        return iter(list(self._by_id.values()))

    def __getitem__(self, request_id: str) -> OpenRequest:
        return self._by_id[request_id]

    def get(self, request_id: str) -> OpenRequest | None:
        return self._by_id.get(request_id)

    def find(self, client: Client, stream: int) -> tuple[OpenRequest, int] | None:
        """The request and its choice that this client knows by that number, while the choice is unfinished."""
        return self._by_stream.get((client, stream))

    def of_client(self, client: Client) -> list[OpenRequest]:
        return [request for request in self._by_id.values() if request.client == client]

    def with_deadline(self) -> list[OpenRequest]:
        return list(self._with_deadline.values())

    def add(self, request: OpenRequest) -> None:
        self._by_id[request.request_id] = request
        for choice in request.unfinished:
            self._by_stream[request.client, request.stream(choice)] = request, choice
        if request.deadline_s is not None:
            self._with_deadline[request.request_id] = request

    def move(self, request: OpenRequest, client: Client, first_stream: int) -> None:
        """It is this client's from now on, by these numbers."""
        for choice in request.unfinished:
            del self._by_stream[request.client, request.stream(choice)]
            self._by_stream[client, first_stream + choice] = request, choice
        request.client, request.first_stream = client, first_stream

    def close_choice(self, request: OpenRequest, choice: int, now: float) -> None:
        """Nothing more is to be told of this choice; with the last one, the request is over."""
        request.unfinished.remove(choice)
        del self._by_stream[request.client, request.stream(choice)]
        if request.unfinished:
            return
        del self._by_id[request.request_id]
        self._with_deadline.pop(request.request_id, None)
        if request.retained is not None:
            request.retained.detached_since = now
        if request.spans is not None:
            request.spans.close(now)

    # ------------------------------------------------------------------------------------------------ what is told

    def send(self, request: OpenRequest, choice: int, delta: TokenDelta) -> None:
        """Its client is told with the next `flush`; what is retained of it has it at once."""
        if request.retained is not None:
            request.retained.history.append(choice, delta)
        self._unsent.setdefault(request.client, []).append(delta)

    def send_start(self, request: OpenRequest, choice: int) -> None:
        """Its client is told with the next `flush` that the choice comes to run."""
        self._unsent.setdefault(request.client, []).append(TokenDelta(request.stream(choice), choice, b""))

    def flush(self) -> None:
        unsent, self._unsent = self._unsent, {}
        for client, deltas in unsent.items():
            self._outbox(client, Deltas(deltas))

    def check(self) -> None:
        """`AssertionError` unless each unfinished choice, and no other, has one stream. For tests."""
        wanted = {
            (request.client, request.stream(choice)): (request, choice)
            for request in self._by_id.values()
            for choice in request.unfinished
        }
        assert self._by_stream == wanted, "streams and unfinished choices differ"
        assert all(request.unfinished for request in self._by_id.values()), "a request is open and nothing of it is"
        with_deadline = {id_: request for id_, request in self._by_id.items() if request.deadline_s is not None}
        assert self._with_deadline == with_deadline, "requests with a deadline differ"
