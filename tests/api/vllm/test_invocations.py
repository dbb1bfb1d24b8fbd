"""Which endpoint a body of `/invocations` is for."""

from __future__ import annotations

import pytest

from rayllm.api.vllm.invocations import endpoint_of
from rayllm.errors import RequestError


@pytest.mark.parametrize(
    ("names", "endpoint"),
    [
        (("messages", "model"), "chat"),
        (("prompt",), "completion"),
        (("query", "documents"), "rerank"),
        (("text_1", "text_2"), "score"),
        (("input", "model"), "embeddings"),
        (("prompt", "messages"), "chat"),
        (("query", "input"), "embeddings"),
    ],
)
def test_a_bodys_fields_say_which_endpoint_it_is_for(names: tuple[str, ...], endpoint: str) -> None:
    assert endpoint_of(dict.fromkeys(names)) == endpoint


@pytest.mark.parametrize("names", [(), ("text",), ("query",), ("documents",), ("text_1",)])
def test_a_body_of_no_endpoint_is_refused_with_what_is_missing(names: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=r"messages \(a chat\).*input \(embeddings\)"):
        endpoint_of(dict.fromkeys(names))
