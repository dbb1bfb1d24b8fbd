"""The flags that name a server, and a client of that server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rayllm.cli.addresses import DEFAULT_URL, server_url
from rayllm.cli.flags import Parser
from rayllm.config import Environment

if TYPE_CHECKING:
    from rayllm.cli.client import ApiClient


def add_server_flags(parser: Parser) -> None:
    text = f"URL, port, name or pid of the server (default: the only local server, else {DEFAULT_URL})"
    parser.add_argument("--url", help=text)
    parser.add_argument("--api-key", help="API key to send (default: RLLM_API_KEY)")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="model name to send (default: the server's first model)"
    )


@contextlib.contextmanager
def connected(given: Mapping[str, Any]) -> Iterator[ApiClient]:
    """A client of the server that the flags name. Whether it answers shows at the first request."""
    from rayllm.cli.client import ApiClient

    client = ApiClient(server_url(given.get("url")), given.get("api_key") or Environment.api_key())
    try:
        yield client
    finally:
        client.close()
