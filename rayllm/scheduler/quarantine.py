"""Requests that may be what makes workers fail: they run one at a time, so that the next fault
shows which of them it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rayllm.scheduler.sequence import Sequence


class Quarantine:
    """Ids of requests that must not run beside each other; beside all other requests they may."""

    def __init__(self, request_ids: Collection[str] = ()):
        self._request_ids = set(request_ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._request_ids

    def holds_back(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether it must wait for another request of the quarantine that is among the `running`."""
        own = sequence.request.request_id
        if own not in self._request_ids:
            return False
        others = {other.request.request_id for other in running} - {own}
        return not others.isdisjoint(self._request_ids)

    def release(self, request_id: str) -> None:
        """The request may run beside the others again; no effect if it is not in quarantine."""
        self._request_ids.discard(request_id)
