"""The driver's side of its clients' sockets: one I/O thread beside the step loop, which never waits for it.

Unix sockets in a private folder always, TCP where a client on another node asks for it. A client shows the
token in its first frame and is answered by an empty `Deltas`; then messages flow both ways until either end
closes.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import msgspec

from rayllm.engine.address import MAX_CLIENT_FRAME_BYTES
from rayllm.executor.channel import (
    MAX_HELLO_BYTES,
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
    SocketDir,
    listen_tcp,
    listen_unix,
    tokens_equal,
)
from rayllm.messages import ClientMessage, Deltas, DriverMessage, Hello

log = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 64 * 2**20
HELLO_TIMEOUT_S = 10.0
_FLUSH_BYTES = 256 * 1024


@dataclass(frozen=True)
class ClientGone:
    """A client left, was dropped for its fault, or did not read: nothing more comes from it or goes to it."""

    reason: str


class _Client:
    __slots__ = (
        "accepted",
        "backlog",
        "closed",
        "has_spoken",
        "hello_deadline",
        "id",
        "lock",
        "name",
        "reader",
        "sock",
    )

    def __init__(self, client_id: int, sock: socket.socket):
        self.id = client_id
        self.sock = sock
        self.name = f"client {client_id}"
        self.reader = FrameReader(self.name, MAX_HELLO_BYTES)
        self.has_spoken = False
        self.accepted = False
        self.hello_deadline = time.monotonic() + HELLO_TIMEOUT_S
        self.lock = threading.Lock()  # guards the three below
        self.backlog = bytearray()
        self.closed = False


class _Waker:
    """Makes a select in another thread return; many wakes before it looks cost one byte."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)
        self._lock = threading.Lock()
        self._pending = False

    def fileno(self) -> int:
        return self._out.fileno()

    def wake(self) -> None:
        with self._lock:
            if not self._pending:
                self._pending = True
                with contextlib.suppress(OSError):
                    self._in.send(b"\0")

    def clear(self) -> None:
        """Call before looking at what one was woken for, so that nothing added later is missed."""
        with self._lock:
            if self._pending:
                self._pending = False
                self._out.recv(64)

    def close(self) -> None:
        with self._lock:
            self._pending = True
            self._in.close()
            self._out.close()


class ClientLink:
    """Accepts clients and carries their messages. `drain`, `send` and `fileno` are for the loop's thread.

    A client that does not read holds at most `max_buffered_bytes` here, then it is dropped; others are not
    touched.
    """

    def __init__(self, max_buffered_bytes: int = MAX_BUFFERED_BYTES):
        self.token = secrets.token_hex(16)
        self.tcp_address: tuple[str, int] | None = None
        self._max_buffered_bytes = max_buffered_bytes
        self._dir = SocketDir()
        self.unix_path = self._dir.path
        self._clients: dict[Hashable, _Client] = {}
        self._unauthenticated: set[_Client] = set()
        self._num_clients = 0
        self._inbox: deque[tuple[int, ClientMessage | ClientGone]] = deque()
        self._inbox_waker = _Waker()
        self._commands: deque[Callable[[], None]] = deque()
        self._io_waker = _Waker()
        self._writer = FrameWriter()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._hello_decoder = msgspec.msgpack.Decoder(Hello)
        self._welcome = bytes(FrameWriter().frame(Deltas([])))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._io_waker, selectors.EVENT_READ, self._run_commands)
        self._listeners = [listen_unix(self.unix_path)]
        self._watch_listener(self._listeners[0])
        self._running = True
        self._thread = threading.Thread(target=self._io, name="client-io", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------- the loop's thread

    def fileno(self) -> int:
        """Readable when `drain` has something, or after `wake`."""
        return self._inbox_waker.fileno()

    def wake(self) -> None:
        """Makes a wait for `fileno` return; from any thread."""
        self._inbox_waker.wake()

    def drain(self) -> list[tuple[int, ClientMessage | ClientGone]]:
        """All that came since the last call: client and message, in order for each client."""
        self._inbox_waker.clear()
        inbox, events = self._inbox, []
        while inbox:
            events.append(inbox.popleft())
        return events

    def send(self, client_id: Hashable, message: DriverMessage) -> None:
        """Sends at once what the socket takes and keeps the rest for the I/O thread; never blocks. A client
        that is gone is ignored: `drain` tells of it.
        """
        client = self._clients.get(client_id)
        if client is None:
            return
        try:
            frame = self._writer.frame(message)
        except FrameTooLargeError as error:
            self._disconnect(client, str(error))
            return
        with client.lock:
            if client.closed:
                return
            had_backlog = bool(client.backlog)
            sent = 0 if had_backlog else _send_some(client.sock, frame)
            if sent == len(frame):
                return
            client.backlog += memoryview(frame)[sent:]
            num_bytes = len(client.backlog)
        if num_bytes > self._max_buffered_bytes:
            self._disconnect(
                client, f"it does not read: {num_bytes} bytes are buffered, the limit is {self._max_buffered_bytes}"
            )
        elif not had_backlog:
            self._post(lambda: self._watch_client(client))

    def buffered_bytes(self, client_id: Hashable) -> int:
        """Bytes that wait for this client beyond what its socket holds."""
        client = self._clients.get(client_id)
        return 0 if client is None else len(client.backlog)

    # ------------------------------------------------------------------------------------------ any thread

    def listen_tcp(self, host: str) -> tuple[str, int]:
        """Opens TCP on `host`, once; returns host and port."""
        if self.tcp_address is None:
            sock = listen_tcp(host)
            self.tcp_address = host, sock.getsockname()[1]
            self._listeners.append(sock)
            self._post(lambda: self._watch_listener(sock))
        return self.tcp_address

    def close(self) -> None:
        """Closes every socket and removes the folder; idempotent."""
        if self._running:
            self._running = False
            self._io_waker.wake()
            self._thread.join(5.0)
            self._inbox_waker.close()
            self._dir.close()

    # ----------------------------------------------------------------------------------------- the I/O thread

    def _io(self) -> None:
        while self._running:
            for key, events in self._selector.select(self._next_deadline_s()):
                if isinstance(key.data, _Client):
                    self._serve(key.data, events)
                else:
                    key.data()
            self._drop_unauthenticated()
        for client in (*self._clients.values(), *self._unauthenticated):
            client.sock.close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        self._io_waker.close()

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._io_waker.wake()

    def _run_commands(self) -> None:
        self._io_waker.clear()
        while self._commands:
            self._commands.popleft()()

    def _watch_listener(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.warning("cannot accept a client: %s", error)
                time.sleep(0.1)  # most likely out of file descriptors
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._num_clients += 1
        client = _Client(self._num_clients, sock)
        self._unauthenticated.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if events & selectors.EVENT_READ and not client.closed:
            try:
                self._read(client)
            except (OSError, msgspec.MsgspecError) as error:
                self._drop(client, str(error))

    def _read(self, client: _Client) -> None:
        try:
            num_bytes = client.sock.recv_into(client.reader.space())
        except BlockingIOError:
            return
        if num_bytes == 0:
            # Who only looks whether somebody listens here (`machine.orphan_cleanup`) leaves without a word.
            level = logging.WARNING if client.has_spoken else logging.DEBUG
            self._drop(client, f"{client.name} closed the connection", level)
            return
        client.has_spoken = True
        client.reader.received(num_bytes)
        while not client.closed and (frame := client.reader.next_frame()) is not None:
            if client.accepted:
                self._inbox.append((client.id, self._decoder.decode(frame)))
            else:
                self._authenticate(client, self._hello_decoder.decode(frame))
        if self._inbox:
            self._inbox_waker.wake()

    def _authenticate(self, client: _Client, hello: Hello) -> None:
        self._unauthenticated.discard(client)
        if not tokens_equal(hello.token, self.token):
            self._drop(client, "wrong token")
            return
        client.name = client.reader.peer = f"client {hello.client!r}"
        client.reader.max_frame_bytes = MAX_CLIENT_FRAME_BYTES
        client.accepted = True
        self._clients[client.id] = client
        _send_some(client.sock, self._welcome)

    def _flush(self, client: _Client) -> None:
        with client.lock:
            if client.backlog and not client.closed:
                del client.backlog[: _send_some(client.sock, client.backlog[:_FLUSH_BYTES])]
        self._watch_client(client)

    def _watch_client(self, client: _Client) -> None:
        """Asks to be told when the client can take its backlog, only while there is one."""
        with client.lock:
            if client.closed:
                return
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.backlog else 0)
        self._selector.modify(client.sock, events, client)

    def _disconnect(self, client: _Client, reason: str) -> None:
        """From the loop's thread: forgets what waits at once, and leaves the closing to the I/O thread."""
        with client.lock:
            client.closed = True
            client.backlog = bytearray()
        self._post(lambda: self._drop(client, reason))

    def _drop(self, client: _Client, reason: str, level: int = logging.WARNING) -> None:
        """`level`: of the line in the log for one that was never accepted."""
        with client.lock:
            client.closed = True
            client.backlog = bytearray()
            if client.sock.fileno() < 0:
                return
            self._selector.unregister(client.sock)
            client.sock.close()
        self._unauthenticated.discard(client)
        if self._clients.pop(client.id, None) is None:
            log.log(level, "refused a client: %s", reason)
            return
        log.info("%s left: %s", client.name, reason)
        self._inbox.append((client.id, ClientGone(reason)))
        self._inbox_waker.wake()

    def _next_deadline_s(self) -> float | None:
        if not self._unauthenticated:
            return None
        return max(0.0, min(client.hello_deadline for client in self._unauthenticated) - time.monotonic())

    def _drop_unauthenticated(self) -> None:
        now = time.monotonic()
        for client in [client for client in self._unauthenticated if client.hello_deadline <= now]:
            self._drop(client, f"it did not authenticate within {HELLO_TIMEOUT_S:g} s")


def _send_some(sock: socket.socket, data: bytes | bytearray) -> int:
    """Bytes taken at once. A broken socket takes none: the I/O thread reads its end."""
    try:
        return sock.send(data)
    except OSError:
        return 0
