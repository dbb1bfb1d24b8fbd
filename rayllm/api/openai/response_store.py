"""Responses that were made here, so that later requests can name them: in this process's memory, within bounds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import orjson

from rayllm.errors import RequestError

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20
MAX_AGE_S = 24 * 3600.0


class StoredResponse:
    """One response, as far as it has come. `context`: the items that it continued."""

    def __init__(self, client_key: str, response: dict[str, Any], context: list[dict[str, Any]]):
        self.key = client_key, str(response["id"])
        self.response = response
        self.context = context
        self.stored_s = time.monotonic()
        self.num_bytes = 0
        self.cancel: Callable[[], None] | None = None
        """Ends it; None where only its own connection can."""
        self.num_event_bytes: Callable[[], int] = int
        """Of the events that are held for it."""

    @property
    def ended(self) -> bool:
        return self.response["status"] not in ("queued", "in_progress")


class ResponseStore:
    """What one process keeps. The oldest that have ended go first; `on_dropped` is called with each that goes."""

    def __init__(
        self,
        on_dropped: Callable[[StoredResponse], None] = lambda stored: None,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
    ):
        self._on_dropped = on_dropped
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def add(self, stored: StoredResponse) -> None:
        self._stored[stored.key] = stored
        self.weigh(stored)

    def weigh(self, stored: StoredResponse) -> None:
        """Counts its bytes anew."""
        if stored.key not in self._stored:
            return
        num_bytes = len(orjson.dumps(stored.response)) + len(orjson.dumps(stored.context))
        num_bytes += stored.num_event_bytes()
        self._num_bytes += num_bytes - stored.num_bytes
        stored.num_bytes = num_bytes
        self.trim()

    def has(self, client_key: str, response_id: str) -> bool:
        return (client_key, response_id) in self._stored

    def get(self, client_key: str, response_id: str) -> StoredResponse:
        """Raises `RequestError` (404); what another client made is not there either."""
        self.trim()
        stored = self._stored.get((client_key, response_id))
        if stored is None:
            raise RequestError(
                f"Response with id {response_id[:100]!r} not found. The server process that made it keeps it "
                f"for {self._max_age_s / 3600:g} h at most, among the last {self._max_responses} and within "
                f"{self._max_bytes / 2**20:g} MiB, unless store=false; other replicas do not see it",
                param="response_id",
                code="response_not_found",
                status=404,
            )
        return stored

    def item(self, client_key: str, item_id: str) -> dict[str, Any] | None:
        """An item of that client's stored responses."""
        for (owner, _), stored in reversed(self._stored.items()):
            if owner == client_key:
                for item in (*stored.response["output"], *stored.context):
                    if item["id"] == item_id:
                        return dict(item)
        return None

    def delete(self, client_key: str, response_id: str) -> None:
        self._drop(self.get(client_key, response_id))

    def forget(self, stored: StoredResponse) -> None:
        """It goes on elsewhere."""
        if self._stored.pop(stored.key, None) is not None:
            self._num_bytes -= stored.num_bytes

    def trim(self) -> None:
        """Lets go of what is too old or too much."""
        oldest_s = time.monotonic() - self._max_age_s
        for stored in list(self._stored.values()):
            too_much = len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes
            if not too_much and stored.stored_s >= oldest_s:
                return
            if stored.ended:
                self._drop(stored)

    def _drop(self, stored: StoredResponse) -> None:
        del self._stored[stored.key]
        self._num_bytes -= stored.num_bytes
        if stored.cancel is not None:
            stored.cancel()
        self._on_dropped(stored)
