from __future__ import annotations

import contextlib
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rayllm.engine.driver import link as link_module
from rayllm.engine.driver.link import ClientGone, ClientLink
from rayllm.executor.channel import Channel, PeerGoneError, connect
from rayllm.messages import Abort, Deltas, DriverMessage, StatsQuery, TokenDelta

Event = tuple[int, Any]


@pytest.fixture
def link() -> Iterator[ClientLink]:
    link = ClientLink(max_buffered_bytes=2_000_000)
    yield link
    link.close()


@pytest.fixture
def join(link: ClientLink) -> Iterator[Callable[..., Channel]]:
    """Connects a client that has been welcomed."""
    channels: list[Channel] = []

    def join(name: str = "a") -> Channel:
        channel = connect(link.unix_path, link.token, name, "the driver")
        channels.append(channel)
        assert _decode(channel.receive(5.0)) == Deltas([])
        return channel

    yield join
    for channel in channels:
        channel.close()


def _decode(frame: memoryview) -> DriverMessage:
    return msgspec.msgpack.decode(frame, type=DriverMessage)


def _events(link: ClientLink, count: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < count:
        assert select.select([link], [], [], 5.0)[0], f"{events} is all that came"
        events += link.drain()
    return events


def _deltas(num_bytes: int) -> Deltas:
    return Deltas([TokenDelta(1, 0, b"x" * num_bytes)])


def test_messages_come_with_their_client_in_order(link: ClientLink, join: Callable[..., Channel]) -> None:
    first, second = join("a"), join("b")
    first.send(Abort(1))
    first.send(StatsQuery(2))
    [(one, abort), (again, query)] = _events(link, 2)
    assert (abort, query) == (Abort(1), StatsQuery(2))
    second.send(Abort(3))
    [(two, message)] = _events(link, 1)
    assert message == Abort(3)
    assert one == again != two
    link.send(two, _deltas(3))
    assert _decode(second.receive(5.0)) == _deltas(3)
    with pytest.raises(TimeoutError):
        first.receive(0.05)


def test_a_wait_ends_only_when_there_is_something_or_on_wake(link: ClientLink, join: Callable[..., Channel]) -> None:
    client = join()
    link.drain()
    assert not select.select([link], [], [], 0.05)[0]
    link.wake()
    assert select.select([link], [], [], 5.0)[0]
    assert link.drain() == []
    assert not select.select([link], [], [], 0.05)[0]
    client.send(Abort(1))
    assert select.select([link], [], [], 5.0)[0]


def test_a_client_that_leaves_is_told_and_may_still_be_sent_to(link: ClientLink, join: Callable[..., Channel]) -> None:
    client = join()
    client.send(Abort(1))
    client.close()
    [(number, _), (gone, event)] = _events(link, 2)
    assert gone == number
    assert isinstance(event, ClientGone)
    link.send(number, _deltas(3))
    assert link.buffered_bytes(number) == 0


def test_a_wrong_token_closes_the_socket_and_nothing_comes_through(
    link: ClientLink, join: Callable[..., Channel]
) -> None:
    stranger = connect(link.unix_path, "guess", "a", "the driver")
    with contextlib.suppress(PeerGoneError):  # it may be closed by now
        stranger.send(Abort(1))
    with pytest.raises(PeerGoneError):
        stranger.receive(5.0)
    stranger.close()
    join().send(Abort(2))
    assert [event for _, event in _events(link, 1)] == [Abort(2)]


def test_a_stranger_may_not_send_a_long_frame_or_stay_silent(link: ClientLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HELLO_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as huge, socket.socket(socket.AF_UNIX) as mute:
        for sock in (huge, mute):
            sock.settimeout(5.0)
            sock.connect(link.unix_path)
        huge.sendall(struct.pack("<I", 1_000_000))
        assert huge.recv(1) == b""
        assert mute.recv(1) == b""


def test_one_that_only_looks_whether_somebody_listens_is_no_warning(
    link: ClientLink, caplog: pytest.LogCaptureFixture
) -> None:
    for said in (b"", b"\0"):  # the first has left before the second comes
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(link.unix_path)
            caller.sendall(said)
    deadline = time.monotonic() + 5.0
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "closed the connection" in warning


def test_rubbish_from_a_client_ends_that_client_alone(link: ClientLink, join: Callable[..., Channel]) -> None:
    bad, good = join("bad"), join("good")
    bad.sock.sendall(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    [(_, event)] = _events(link, 1)
    assert isinstance(event, ClientGone)
    good.send(Abort(1))
    assert [event for _, event in _events(link, 1)] == [Abort(1)]


def test_a_slow_reader_gets_everything_in_order_and_delays_nobody(
    link: ClientLink, join: Callable[..., Channel]
) -> None:
    slow, quick = join("slow"), join("quick")
    numbers = []
    for client in (slow, quick):
        client.send(Abort(0))
        [(number, _)] = _events(link, 1)
        numbers.append(number)
    sent = [Deltas([TokenDelta(n, 0, b"x" * 10_000)]) for n in range(150)]
    for message in sent:
        link.send(numbers[0], message)
    assert link.buffered_bytes(numbers[0]) > 0
    link.send(numbers[1], _deltas(3))
    assert _decode(quick.receive(5.0)) == _deltas(3)
    assert [_decode(slow.receive(5.0)) for _ in sent] == sent
    deadline = time.monotonic() + 5.0
    while link.buffered_bytes(numbers[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert link.buffered_bytes(numbers[0]) == 0


def test_a_client_that_does_not_read_is_dropped_at_the_limit(link: ClientLink, join: Callable[..., Channel]) -> None:
    mute, other = join("mute"), join("other")
    mute.send(Abort(0))
    [(number, _)] = _events(link, 1)
    for _ in range(40):
        link.send(number, _deltas(100_000))
        assert link.buffered_bytes(number) <= 2_000_000
    [(gone, event)] = _events(link, 1)
    assert gone == number
    assert "does not read" in event.reason
    assert "2000000" in event.reason
    other.send(Abort(1))
    assert [event for _, event in _events(link, 1)] == [Abort(1)]


def test_tcp_is_closed_until_asked_for_and_serves_the_same(link: ClientLink) -> None:
    assert link.tcp_address is None
    address = link.listen_tcp("127.0.0.1")
    assert link.listen_tcp("127.0.0.1") == address
    client = connect(address, link.token, "far", "the driver")
    assert _decode(client.receive(5.0)) == Deltas([])
    client.send(Abort(9))
    assert [event for _, event in _events(link, 1)] == [Abort(9)]
    client.close()


def test_the_folder_of_the_socket_is_private_and_goes_with_the_link() -> None:
    link = ClientLink()
    folder = Path(link.unix_path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    client = connect(link.unix_path, link.token, "a", "the driver")
    client.receive(5.0)
    link.close()
    link.close()
    assert not folder.exists()
    with pytest.raises(PeerGoneError):
        client.receive(5.0)
    client.close()
