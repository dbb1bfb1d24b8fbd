"""`/v1/responses/{id}` and what lies below it: what a response that was kept is asked afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.api.openai.response_store import ResponseStore
from rayllm.errors import RequestError, shorten


def cancelled(store: ResponseStore, client_key: str, response_id: str) -> dict[str, Any]:
    """Ends a response that works in the background; one that has ended stays as it is."""
    stored = store.get(client_key, response_id)
    if not stored.response["background"]:
        raise RequestError(
            f"Cannot cancel a synchronous response. {response_id!r} was not made with background=true: close its "
            "connection to end it",
            param="response_id",
        )
    if stored.cancel is not None:
        stored.cancel()
    return stored.response


def deleted(store: ResponseStore, client_key: str, response_id: str) -> dict[str, Any]:
    store.delete(client_key, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def input_items(store: ResponseStore, client_key: str, response_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of what the response was made from, the newest first unless `order=asc`."""
    context = store.get(client_key, response_id).context
    order, after, limit = query.get("order", "desc"), query.get("after"), _limit(query.get("limit", "20"))
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {shorten(order)}", param="order")
    items = context if order == "asc" else context[::-1]
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise RequestError(f"after: the response has no item {shorten(after)}", param="after")
        items = items[place + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 100:
        raise RequestError(f"limit must be from 1 to 100, got {shorten(text)}", param="limit")
    return int(text)


def starting_after(query: Mapping[str, str]) -> int:
    """How many events of its stream a client has seen."""
    text = query.get("starting_after")
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestError(f"starting_after must be a sequence number, got {shorten(text)}", param="starting_after")
    return int(text) + 1
