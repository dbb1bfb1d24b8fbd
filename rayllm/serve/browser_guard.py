"""What a web page may ask of a server that asks for no key.

A browser lets any page send requests to any address, so a page that its user only looks at could use a server on that
machine. Two things tell such requests apart. `Origin` and `Sec-Fetch-Site` are set by the browser and name the page.
`Host` is the name that the page was loaded from: a page whose name is made to resolve to 127.0.0.1 (DNS rebinding) is
same-origin with the server, so that only its name gives it away. A server with a key needs neither: a page has none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from rayllm.api.errors import ErrorAnswer, answer
from rayllm.errors import shorten
from rayllm.serve.http_responses import error_response
from rayllm.serve.routes.pages import PAGE_PATHS

ANY = "*"
_READING = ("GET", "HEAD")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class BrowserGuard:
    """Refuses what a foreign page sends. `allowed_hosts`: names that this server is called by, besides addresses and
    localhost (`*.example.com`: every name below it; `*`: any name); None checks no name."""

    def __init__(self, allowed_hosts: Sequence[str] | None, allowed_origins: Sequence[str]):
        self._hosts = None if allowed_hosts is None or ANY in allowed_hosts else [_name(host) for host in allowed_hosts]
        self._origins = frozenset(allowed_origins)

    def refusal(self, scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> ErrorAnswer | None:
        """The answer for a request that a foreign page may have sent; None for any other."""
        values = {name: value.decode("latin-1").strip() for name, value in headers if name in _EXAMINED}
        host = values.get(b"host")
        if host is not None and not self._knows(host):
            return answer(
                403,
                f"the Host {shorten(host)} is not a name of this server: a server without an API key answers to IP "
                "addresses and localhost alone; start it with --allowed-hosts NAME for each further name, or with "
                "--api-key",
                code="host_not_allowed",
            )
        path = scope["path"].removeprefix(scope.get("root_path") or "")
        if scope["method"] in _READING and path in PAGE_PATHS:
            return None
        origin = values.get(b"origin")
        if origin is None:
            return self._embedded(values)
        if self._is_allowed(origin, host):
            return None
        return answer(
            403,
            f"the Origin {shorten(origin)} is another one than this server's: a server without an API key takes "
            "requests of other web pages only from those that --allowed-origins names, or start it with --api-key",
            code="origin_not_allowed",
        )

    def _knows(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = _name(host)
        if name == "localhost" or _is_address(name):
            return True
        return any(name == known or (known.startswith("*.") and name.endswith(known[1:])) for known in self._hosts)

    def _is_allowed(self, origin: str, host: str | None) -> bool:
        if ANY in self._origins or origin.lower() in self._origins:
            return True
        scheme, _, authority = origin.lower().partition("://")
        return host is not None and bool(authority) and _with_port(authority, scheme) == _with_port(host, scheme)

    def _embedded(self, values: dict[bytes, str]) -> ErrorAnswer | None:
        """A picture or script of a foreign page has no Origin. A link that is followed has none either, and the page
        that it was on sees nothing of the answer."""
        is_foreign = values.get(b"sec-fetch-site") in ("cross-site", "same-site")
        if is_foreign and ANY not in self._origins and values.get(b"sec-fetch-mode") != "navigate":
            return answer(
                403,
                "a page of another origin asks for this: start the server with --allowed-origins ORIGIN, or with "
                "--api-key",
                code="origin_not_allowed",
            )
        return None


_EXAMINED = frozenset((b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"))


class Cors(CORSMiddleware):
    """Starlette's, whose refusals of a browser's question are in our envelope."""

    def __init__(self, app: object, allow_origins: Collection[str]):
        super().__init__(
            app,  # type: ignore[arg-type]
            allow_origins=allow_origins,
            allow_methods=["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["x-request-id", "retry-after"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        found = super().preflight_response(request_headers)
        if found.status_code == 200:
            return found
        reason = bytes(found.body).decode()
        refused = answer(
            400, f"{reason}: --allowed-origins names the pages that may call this server", code="origin_not_allowed"
        )
        return error_response(refused)


def _name(host: str) -> str:
    """The name or address of a `Host`, without its port, in small letters."""
    if host.startswith("["):
        return host.partition("]")[0][1:].lower()
    name = host.rpartition(":")[0] if host.count(":") == 1 else host
    return name.lower().rstrip(".")


def _with_port(authority: str, scheme: str) -> str:
    name = _name(authority)
    end = authority.rpartition("]")[2] if authority.startswith("[") else authority
    return f"{name}:{end.partition(':')[2] or _DEFAULT_PORTS.get(scheme, '')}"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
