"""`/invocations`, SageMaker's one route: the body says which endpoint it is for."""

from __future__ import annotations

from typing import Any, Literal

from rayllm.errors import RequestError

Endpoint = Literal["chat", "completion", "embeddings", "rerank", "score"]
_BODIES: tuple[tuple[frozenset[str], Endpoint], ...] = (
    (frozenset({"messages"}), "chat"),
    (frozenset({"prompt"}), "completion"),
    (frozenset({"query", "documents"}), "rerank"),
    (frozenset({"text_1", "text_2"}), "score"),
    (frozenset({"input"}), "embeddings"),
)
"""Fields without which a body is none of that endpoint's, in the order in which they are tried."""


def endpoint_of(fields: dict[str, Any]) -> Endpoint:
    """Raises `RequestError` for a body of none."""
    for needed, endpoint in _BODIES:
        if needed <= fields.keys():
            return endpoint
    raise RequestError(
        "the body is of no endpoint here: give messages (a chat), prompt (a completion), query and documents (a "
        "reranking), text_1 and text_2 (a score) or input (embeddings)"
    )
