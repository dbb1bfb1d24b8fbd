"""Answers on a server's port while Serve's own proxy cannot: 503 with the stage, as JSON or, to a browser that opens a
page, as a page that asks again by itself. That is from the first moment until there is an ingress, and whenever the
proxy has ended and its successor does not listen yet.

Both listen on the port at once (SO_REUSEPORT). A program in the kernel, one instruction long, sends every new
connection to the first listener, which is this one, and from the handover on to the second: no connection is refused
and none meets a proxy that has no application yet. Where there is no second listener, the kernel takes any, which is
this one. Linux; elsewhere the port opens when the proxy does.
"""

from __future__ import annotations

import ctypes
import html
import json
import logging
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rayllm.api.errors import envelope

logger = logging.getLogger(__name__)

_SO_ATTACH_REUSEPORT_CBPF = 51
_BPF_RETURN = 0x06
_FIRST, _SECOND = 0, 1
_READ_TIMEOUT_S = 10.0
_RETRY_S = 1
_MAX_READ_BYTES = 2**20
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>RayLLM starts</title>
<body>
<h1>RayLLM starts</h1>
<p role="status">{stage} ...</p>
<p>This page comes up by itself when the model answers.</p>
"""


class EarlyPort:
    """Listens on `host`:`port` until `close`; `stage` is what it says."""

    def __init__(self, host: str, port: int):
        self.stage = "starting"
        self._server = _Server(host, port, self)
        _steer(self._server.socket, _FIRST)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="early-port", daemon=True
        )
        self._thread.start()
        self._closed = False

    @classmethod
    def open(cls, host: str, port: int) -> EarlyPort | None:
        """None where this system cannot share a port so."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            return cls(host, port)
        except OSError as error:
            logger.warning("port %s opens only with Serve's proxy: %s", port, error)
            return None

    def hand_over(self) -> None:
        """From now on new connections go to the other listener, and come here only while there is none."""
        if self._closed:
            return
        try:
            _steer(self._server.socket, _SECOND)
        except OSError:
            self.close()
        self.stage = "restarting the proxy"

    def close(self) -> None:
        """May be called again."""
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def _steer(listener: socket.socket, index: int) -> None:
    """Has all new connections of the port go to its listener of that index, counted as they began to listen."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, index))
    program = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", 1, ctypes.addressof(instruction))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, early: EarlyPort):
        self.early = early
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), _Handler, bind_and_activate=False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self.socket.bind(self.server_address)
            self.server_activate()
        except OSError:
            self.server_close()
            raise

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that went away is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _READ_TIMEOUT_S
    server: _Server

    def answer(self) -> None:
        self._read_body()
        stage = self.server.early.stage
        if self.command in ("GET", "HEAD") and "text/html" in self.headers.get("accept", ""):
            content = _PAGE.format(stage=html.escape(stage)).encode()
            headers = {
                "content-type": "text/html; charset=utf-8",
                "refresh": str(_RETRY_S),
                "content-security-policy": "default-src 'none'",
            }
        else:
            body = envelope(503, f"not healthy: {stage}", code="not_ready")
            content = json.dumps({**body, "status": "unavailable", "stage": stage, "reason": ""}).encode()
            headers = {"content-type": "application/json"}
        headers |= {"content-length": str(len(content)), "retry-after": str(_RETRY_S), "connection": "close"}
        self.send_response_only(503)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_body(self) -> None:
        """A short body, so that the connection is not reset over what was not read before the answer is."""
        length = self.headers.get("content-length", "")
        if length.isdigit() and len(length) < 10:
            self.rfile.read(min(int(length), _MAX_READ_BYTES))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""
