"""Length-prefixed frames over stream sockets: Unix on one node, TCP without delay across nodes. No pickle.

A frame is a little-endian u32 length and that many bytes. Both ends of a link speak only after the connecting
one has sent a `Hello` with the listener's token.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rayllm.messages import Hello

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 2**20
MAX_HELLO_BYTES = 4096
"""A peer that has not shown the token yet cannot make us hold more than this."""
_READ_BYTES = 64 * 1024
_KEEP_BYTES = 2**20
_MAX_UNIX_PATH = 107
_STALE_AFTER_S = 60.0
_DIR_PREFIX = "rllm-"

Address = str | tuple[str, int]
"""A Unix socket's path, or a TCP host and port."""


class PeerGoneError(ConnectionError):
    """The other end of a channel closed it or is dead; the message names it."""


class FrameTooLargeError(ConnectionError):
    """A frame is longer than the link allows; the message names the peer, the length and the limit."""


class FrameReader:
    """Cuts a stream of bytes into frames. Sockets are read straight into its one buffer, which is used again.

    Read into `space()`, call `received(n)`, then take frames until there is none.
    """

    def __init__(self, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES):
        self.peer = peer
        self.max_frame_bytes = max_frame_bytes
        self._view = memoryview(bytearray(_READ_BYTES))
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes go, never empty. Frames taken before are no longer valid."""
        view, pending = self._view, self._end - self._start
        if pending == 0:
            self._start = self._end = 0
            if len(view) > _KEEP_BYTES:
                self._view = view = memoryview(bytearray(_READ_BYTES))
        needed = _LENGTH.size
        if pending >= needed:
            needed += self._frame_length()
        if self._start + needed > len(view):
            target = view if needed <= len(view) else memoryview(bytearray(needed))
            target[:pending] = view[self._start : self._end]
            self._view, self._start, self._end = target, 0, pending
        return self._view[self._end :]

    def received(self, num_bytes: int) -> None:
        """`num_bytes` were written at the start of `space()`."""
        self._end += num_bytes

    def next_frame(self) -> memoryview | None:
        """A whole frame's payload, valid until `space` is called; None until more bytes come.

        Raises `FrameTooLargeError` as soon as the length is known.
        """
        if self._end - self._start < _LENGTH.size:
            return None
        begin = self._start + _LENGTH.size
        stop = begin + self._frame_length()
        if stop > self._end:
            return None
        self._start = stop
        return self._view[begin:stop]

    @property
    def has_frame(self) -> bool:
        """Whether `next_frame` has one, or raises."""
        pending = self._end - self._start
        if pending < _LENGTH.size:
            return False
        length: int = _LENGTH.unpack_from(self._view, self._start)[0]
        return length > self.max_frame_bytes or pending >= _LENGTH.size + length

    def _frame_length(self) -> int:
        length: int = _LENGTH.unpack_from(self._view, self._start)[0]
        if length > self.max_frame_bytes:
            raise FrameTooLargeError(f"{self.peer} sent a frame of {length} bytes, the limit is {self.max_frame_bytes}")
        return length


class FrameWriter:
    """Encodes messages as frames, into one buffer that is used again."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES):
        self._max_frame_bytes = max_frame_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray(_LENGTH.size)

    def frame(self, message: msgspec.Struct) -> bytearray:
        """Length and payload in one buffer, valid until the next call."""
        buffer = self._buffer
        self._encoder.encode_into(message, buffer, _LENGTH.size)
        length = len(buffer) - _LENGTH.size
        if length > self._max_frame_bytes:
            self._buffer = bytearray(_LENGTH.size)
            raise FrameTooLargeError(
                f"a {type(message).__name__} of {length} bytes exceeds the limit of a frame: "
                f"{self._max_frame_bytes} bytes"
            )
        _LENGTH.pack_into(buffer, 0, length)
        return buffer


class Channel:
    """A connected, blocking socket that carries frames; `peer` names the other end in every error."""

    def __init__(self, sock: socket.socket, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES):
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self.sock = sock
        self._reader = FrameReader(peer, max_frame_bytes)
        self._writer = FrameWriter(max_frame_bytes)

    def fileno(self) -> int:
        return self.sock.fileno()

    def admit(self, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        """The peer has said who it is and may send frames up to this size from now on."""
        self.peer = self._reader.peer = peer
        self._reader.max_frame_bytes = max_frame_bytes

    def send(self, message: msgspec.Struct) -> None:
        """Sends one message whole; blocks while the peer's buffers are full. Raises `PeerGoneError`."""
        try:
            self.sock.sendall(self._writer.frame(message))
        except FrameTooLargeError:
            raise
        except OSError as error:
            raise self._gone(error) from error

    def receive(self, timeout_s: float | None = None) -> memoryview:
        """The next frame, valid until the next call. Raises `PeerGoneError` at the end of the stream and
        `TimeoutError`, after which a frame that had begun is still taken up by the next call.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self._reader.next_frame()) is None:
            self._fill(deadline)
        return frame

    def receive_now(self) -> memoryview | None:
        """The next frame where it is here already, valid until the next call. Never blocks. Raises `PeerGoneError` at
        the end of the stream."""
        frame = self._reader.next_frame()
        if frame is None:
            self._fill_now()
            frame = self._reader.next_frame()
        return frame

    @property
    def has_frame(self) -> bool:
        """Whether `receive` ends at once, without reading from the socket."""
        return self._reader.has_frame

    def read_some(self) -> list[memoryview]:
        """The whole frames that are here already, maybe none, valid until the next read. Never blocks.

        Raises `PeerGoneError` at the end of the stream.
        """
        self._fill_now()
        frames = []
        while (frame := self._reader.next_frame()) is not None:
            frames.append(frame)
        return frames

    def send_some(self, data: bytes | bytearray | memoryview) -> int:
        """How many of the bytes the socket took at once, maybe 0; never blocks. Raises `PeerGoneError`."""
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """Idempotent; the peer reads the end of the stream."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _fill_now(self) -> None:
        try:
            self._count(self.sock.recv_into(self._reader.space(), 0, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return
        except PeerGoneError:
            raise
        except OSError as error:
            raise self._gone(error) from error

    def _fill(self, deadline: float | None) -> None:
        try:
            if deadline is None:
                self._count(self.sock.recv_into(self._reader.space()))
                return
            self.sock.settimeout(max(1e-6, deadline - time.monotonic()))
            try:
                self._count(self.sock.recv_into(self._reader.space()))
            finally:
                self.sock.settimeout(None)
        except TimeoutError:
            raise TimeoutError(f"no frame from {self.peer} within the time limit") from None
        except (PeerGoneError, FrameTooLargeError):
            raise
        except OSError as error:
            raise self._gone(error) from error

    def _count(self, num_bytes: int) -> None:
        if num_bytes == 0:
            raise PeerGoneError(f"{self.peer} closed the connection")
        self._reader.received(num_bytes)

    def _gone(self, error: OSError) -> PeerGoneError:
        return PeerGoneError(f"{self.peer} is gone: {error.strerror or error}")


def tokens_equal(given: str, expected: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


class SocketDir:
    """A folder of mode 0700 with a path short enough for a Unix socket; gone after `close`."""

    def __init__(self) -> None:
        _sweep_stale_dirs()
        self._folder = _make_short_dir()
        self.path = str(self._folder / "s")

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _make_short_dir() -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = Path(tempfile.mkdtemp(prefix=_DIR_PREFIX, dir=parent))
        if len(os.fsencode(folder / "s")) <= _MAX_UNIX_PATH:
            return folder
        folder.rmdir()
    raise OSError(f"no temporary folder has a path shorter than {_MAX_UNIX_PATH} bytes: set TMPDIR to a short one")


def _sweep_stale_dirs() -> None:
    """Removes folders of our user that killed processes left: their socket refuses, and they are not new."""
    for folder in Path(tempfile.gettempdir()).glob(_DIR_PREFIX + "*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            path = folder / "s"
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _STALE_AFTER_S and path.is_socket():
                with socket.socket(socket.AF_UNIX) as probe:
                    try:
                        probe.connect(str(path))
                    except ConnectionRefusedError:
                        shutil.rmtree(folder, ignore_errors=True)


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path`, whose folder guards it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def listen_tcp(host: str) -> socket.socket:
    """A listening TCP socket on a free port of `host` alone, never of all interfaces."""
    return socket.create_server((host, 0), family=_family(host), backlog=128)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Listener:
    """Waits for named peers that know the token: on a Unix socket, or on a TCP host given."""

    def __init__(self, token: str, tcp_host: str | None = None):
        self._token = token
        self._dir: SocketDir | None = None
        self.address: Address
        if tcp_host is None:
            self._dir = SocketDir()
            self.address = self._dir.path
            self._sock = listen_unix(self.address)
        else:
            self._sock = listen_tcp(tcp_host)
            self.address = tcp_host, self._sock.getsockname()[1]

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self, timeout_s: float, hello_timeout_s: float = 5.0) -> Channel:
        """The next peer that shows the token; `peer` is the name it gives. Others are closed without an
        answer.

        Raises `TimeoutError`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._sock.settimeout(max(1e-6, deadline - time.monotonic()))
            sock, _ = self._sock.accept()
            channel = Channel(sock, "a new peer", MAX_HELLO_BYTES)
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                hello = msgspec.msgpack.decode(channel.receive(hello_timeout_s), type=Hello)
                if tokens_equal(hello.token, self._token):
                    channel.admit(hello.client)
                    return channel
            channel.close()

    def close(self) -> None:
        self._sock.close()
        if self._dir is not None:
            self._dir.close()


def connect(address: Address, token: str, name: str, peer: str, timeout_s: float = 10.0) -> Channel:
    """Connects and says `Hello` as `name`; tries again while nobody listens. Raises `PeerGoneError`."""
    refusal: OSError | None = None
    for _ in _attempts(timeout_s):
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else _family(address[0]), socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
        except (ConnectionRefusedError, FileNotFoundError, TimeoutError) as error:
            sock.close()
            refusal = error
            continue
        except OSError:
            sock.close()
            raise
        channel = Channel(sock, peer)
        channel.send(Hello(token=token, client=name))
        return channel
    raise PeerGoneError(f"{peer} is not listening at {address}: {refusal}")


def _attempts(timeout_s: float) -> Iterator[None]:
    deadline, pause_s = time.monotonic() + timeout_s, 0.01
    while True:
        yield
        if time.monotonic() + pause_s > deadline:
            return
        time.sleep(pause_s)
        pause_s = min(0.5, 2 * pause_s)
