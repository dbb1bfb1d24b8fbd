"""One connection, bytes out, HTTP answers in: for requests that no HTTP client would send."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Exchange:
    """What came back; `closed` says that the server (or the case itself) ended the connection."""

    answers: list[Answer] = field(default_factory=list)
    closed: bool = False
    num_bytes: int = 0
    elapsed_s: float = 0.0


def exchange(
    address: tuple[str, int], data: bytes, *, timeout_s: float, num_answers: int = 1, close: str | None = None
) -> Exchange:
    """Sends `data` while reading, until so many answers are whole, the server closes, or the time is up.

    `close`: "half" ends our side once all is sent, "rst" resets the connection then.
    """
    found = Exchange()
    started_s = time.monotonic()
    received = bytearray()
    unsent = memoryview(data)
    with socket.create_connection(address, timeout=5) as connection:
        connection.setblocking(False)
        while len(found.answers) < num_answers and not found.closed and time.monotonic() - started_s < timeout_s:
            writers = [connection] if unsent else []
            readable, writable, _ = select.select([connection], writers, [], 0.5)
            if writable:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    unsent = unsent[connection.send(unsent[: 1 << 18]) :]
                if not unsent and close == "rst":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return Exchange(closed=True)
                if not unsent and close == "half":
                    connection.shutdown(socket.SHUT_WR)
            if readable:
                try:
                    piece = connection.recv(1 << 18)
                except ConnectionError:
                    piece = b""
                received += piece
                found.closed = not piece
                found.answers = parse(bytes(received), ended=found.closed)
    found.num_bytes = len(received)
    found.elapsed_s = time.monotonic() - started_s
    return found


def parse(data: bytes, *, ended: bool) -> list[Answer]:
    """The whole answers at the start of `data`; interim ones (1xx) are left out."""
    answers = []
    while (end := data.find(b"\r\n\r\n")) >= 0:
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        body, rest = _body(data[end + 4 :], headers, status, ended)
        if body is None:
            break
        if status >= 200:
            answers.append(Answer(status, headers, body))
        data = rest
    return answers


def _body(data: bytes, headers: dict[str, str], status: int, ended: bool) -> tuple[bytes | None, bytes]:
    if status < 200 or status in (204, 304):
        return b"", data
    if headers.get("transfer-encoding") == "chunked":
        return _chunks(data)
    if "content-length" in headers:
        length = int(headers["content-length"])
        return (data[:length], data[length:]) if len(data) >= length else (None, data)
    return (data, b"") if ended else (None, data)


def _chunks(data: bytes) -> tuple[bytes | None, bytes]:
    body, position = b"", 0
    while (end := data.find(b"\r\n", position)) >= 0:
        size = int(data[position:end], 16)
        start = end + 2
        if len(data) < start + size + 2:
            break
        body += data[start : start + size]
        position = start + size + 2
        if not size:
            return body, data[position:]
    return None, data
