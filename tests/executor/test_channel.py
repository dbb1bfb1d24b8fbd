from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from rayllm.executor import channel as channel_module
from rayllm.executor.channel import (
    MAX_HELLO_BYTES,
    Channel,
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
    Listener,
    PeerGoneError,
    SocketDir,
    connect,
)
from rayllm.messages import Abort, Hello


def _feed(reader: FrameReader, data: bytes) -> list[bytes]:
    """Gives the reader all bytes, as much at a time as it has room for, and takes every frame."""
    frames = []
    while data:
        space = reader.space()
        part, data = data[: len(space)], data[len(space) :]
        space[: len(part)] = part
        reader.received(len(part))
        while (frame := reader.next_frame()) is not None:
            frames.append(bytes(frame))
    return frames


def _framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    channels = Channel(left, "right"), Channel(right, "left", max_frame_bytes=1000)
    yield channels
    for end in channels:
        end.close()


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_frames_come_out_whole_however_the_stream_is_cut(step: int) -> None:
    payloads = [b"", b"a", b"bc" * 40, os.urandom(300), b"", b"end"]
    stream = b"".join(_framed(payload) for payload in payloads)
    reader, frames = FrameReader("peer"), []
    for begin in range(0, len(stream), step):
        frames += _feed(reader, stream[begin : begin + step])
    assert frames == payloads


def test_a_frame_longer_than_the_buffer_is_read_and_small_ones_after_it() -> None:
    payloads = [b"x", os.urandom(3_000_000), b"y" * 70_000, b"z"]
    assert _feed(FrameReader("peer"), b"".join(_framed(payload) for payload in payloads)) == payloads


def test_frames_that_straddle_the_end_of_the_buffer_are_kept_whole() -> None:
    payloads = [bytes([n % 251]) * 1021 for n in range(500)]
    assert _feed(FrameReader("peer"), b"".join(_framed(payload) for payload in payloads)) == payloads


def test_too_long_a_frame_is_refused_at_its_length_with_the_peer_and_the_limit() -> None:
    reader = FrameReader("worker rank 3", max_frame_bytes=100)
    with pytest.raises(FrameTooLargeError, match="worker rank 3 sent a frame of 101 bytes, the limit is 100"):
        _feed(reader, struct.pack("<I", 101))


def test_too_long_a_message_is_not_sent() -> None:
    writer = FrameWriter(max_frame_bytes=100)
    with pytest.raises(FrameTooLargeError, match=r"Hello of .* bytes .* 100 bytes"):
        writer.frame(Hello("t" * 200, "c"))
    assert bytes(writer.frame(Abort(1))) == _framed(msgspec.msgpack.encode(Abort(1)))


def test_a_message_sent_is_the_message_received(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    for stream in range(3):
        left.send(Abort(stream))
    received = [msgspec.msgpack.decode(right.receive(1.0), type=Abort).stream for _ in range(3)]
    assert received == [0, 1, 2]


def test_the_end_of_the_stream_names_the_peer(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.close()
    with pytest.raises(PeerGoneError, match="left closed the connection"):
        right.receive()
    with pytest.raises(PeerGoneError, match="left is gone"):
        right.send(Abort(1))


def test_a_frame_cut_by_a_timeout_is_taken_up_again(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.sock.sendall(_framed(b"hello")[:6])
    with pytest.raises(TimeoutError, match="no frame from left"):
        right.receive(0.01)
    left.sock.sendall(_framed(b"hello")[6:])
    assert bytes(right.receive(1.0)) == b"hello"


def test_reading_some_never_waits(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    assert right.read_some() == []
    left.sock.sendall(_framed(b"a") + _framed(b"b") + b"\x01")
    assert [bytes(frame) for frame in right.read_some()] == [b"a", b"b"]
    assert right.read_some() == []
    left.close()
    with pytest.raises(PeerGoneError, match="left closed the connection"):
        right.read_some()


def test_sending_some_stops_where_the_peer_does_not_read(pair: tuple[Channel, Channel]) -> None:
    left, _ = pair
    total = 0
    while sent := left.send_some(b"x" * 100_000):
        total += sent
    assert 0 < total < 50_000_000


def test_the_socket_folder_is_private_short_and_goes_away() -> None:
    folder = SocketDir()
    parent = Path(folder.path).parent
    assert stat.S_IMODE(parent.stat().st_mode) == 0o700
    assert len(os.fsencode(folder.path)) < 108
    folder.close()
    assert not parent.exists()


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = SocketDir()
    assert len(os.fsencode(folder.path)) < 108
    assert list(long.iterdir()) == []
    folder.close()


def test_folders_of_dead_processes_are_swept_and_those_of_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_STALE_AFTER_S", -1.0)
    monkeypatch.setattr(channel_module.tempfile, "gettempdir", lambda: ".")
    monkeypatch.chdir(tmp_path)  # so that the sockets' paths are short
    alive, dead = tmp_path / "rllm-alive", tmp_path / "rllm-dead"
    sockets = []
    for folder in (alive, dead):
        folder.mkdir()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"{folder.name}/s")
        sock.listen()
        sockets.append(sock)
    sockets[1].close()
    channel_module._sweep_stale_dirs()
    assert alive.exists()
    assert not dead.exists()
    sockets[0].close()


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_a_peer_with_the_token_is_known_by_its_name(host: str | None) -> None:
    listener = Listener("secret", host)
    client = connect(listener.address, "secret", "7", "the driver")
    server = listener.accept(5.0)
    assert server.peer == "7"
    client.send(Abort(5))
    assert msgspec.msgpack.decode(server.receive(1.0), type=Abort) == Abort(5)
    for end in (client, server, listener):
        end.close()


def test_peers_with_a_wrong_token_with_rubbish_or_with_silence_are_closed_and_the_next_is_served() -> None:
    listener = Listener("secret")
    assert isinstance(listener.address, str)
    liar = connect(listener.address, "secreT", "0", "the driver")
    noisy, huge, mute = (socket.socket(socket.AF_UNIX) for _ in range(3))
    for sock in (noisy, huge, mute):
        sock.connect(listener.address)
    noisy.sendall(_framed(b"\xc1rubbish"))
    huge.sendall(struct.pack("<I", MAX_HELLO_BYTES + 1))
    honest = connect(listener.address, "secret", "1", "the driver")
    server = listener.accept(5.0, hello_timeout_s=0.05)
    assert server.peer == "1"
    with pytest.raises(PeerGoneError):
        liar.receive(1.0)
    assert noisy.recv(1) == huge.recv(1) == mute.recv(1) == b""
    for end in (liar, noisy, huge, mute, honest, server, listener):
        end.close()


def test_nobody_coming_is_a_timeout() -> None:
    listener = Listener("secret")
    with pytest.raises(TimeoutError):
        listener.accept(0.01)
    listener.close()


def test_connecting_waits_for_a_listener_that_is_late() -> None:
    early = Listener("secret", "127.0.0.1")
    address = early.address
    early.close()
    late: list[socket.socket] = []

    def listen() -> None:
        time.sleep(0.1)
        assert isinstance(address, tuple)
        late.append(socket.create_server(address))

    thread = threading.Thread(target=listen)
    thread.start()
    client = connect(address, "secret", "0", "the driver", timeout_s=5.0)
    thread.join()
    client.close()
    late[0].close()


def test_connecting_to_nobody_says_where(tmp_path: Path) -> None:
    with pytest.raises(PeerGoneError, match=r"the driver is not listening at .*nobody"):
        connect(str(tmp_path / "nobody"), "secret", "0", "the driver", timeout_s=0.05)
