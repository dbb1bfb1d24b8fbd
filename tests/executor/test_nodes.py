from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from rayllm.executor.nodes import Raylet, describe_lost, find_lost, why_lost

ID = "0123456789abcdef"


@pytest.fixture
def listen() -> Iterator[Callable[[Callable[[socket.socket], None]], Raylet]]:
    """A raylet that does this with each connection."""
    listeners: list[socket.socket] = []

    def start(serve: Callable[[socket.socket], None]) -> Raylet:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        return Raylet(ID, *listener.getsockname())

    yield start
    for listener in listeners:
        listener.close()


def test_a_grpc_server_answers_whatever_it_serves() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert why_lost(Raylet(ID, "127.0.0.1", port)) == ""
    server.stop(None).wait()


def test_a_process_that_closes_the_connection_lives(listen: Callable[..., Raylet]) -> None:
    assert why_lost(listen(lambda connection: None)) == ""


def test_a_port_where_nothing_listens_is_seen_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began_s = time.monotonic()
    assert why_lost(Raylet(ID, "127.0.0.1", port), 30) == f"nothing listens at its raylet's address 127.0.0.1:{port}"
    assert time.monotonic() - began_s < 10


def test_a_frozen_process_is_lost_when_its_time_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel takes connections for it
        raylet = Raylet(ID, *listener.getsockname())
        assert why_lost(raylet, 0.2) == f"its raylet at 127.0.0.1:{raylet.port} did not answer within 0.2 s (timed out)"


def test_what_ray_says_is_dead_is_not_asked() -> None:
    assert why_lost(Raylet(ID, "192.0.2.1", 1, is_alive=False)) == "Ray declared it dead"


def test_all_nodes_are_asked_at_once_and_only_the_wanted_ones(listen: Callable[..., Raylet]) -> None:
    frozen = [socket.create_server(("127.0.0.1", 0)) for _ in range(8)]
    raylets = [Raylet(f"f{number}", *one.getsockname()) for number, one in enumerate(frozen)]
    alive = listen(lambda connection: None)
    began_s = time.monotonic()
    assert find_lost([*raylets, alive], 0.5).keys() == {raylet.node_id for raylet in raylets}
    assert time.monotonic() - began_s < 8 * 0.5
    assert find_lost([*raylets, alive], 0.2, {ID, "f1"}).keys() == {"f1"}
    assert find_lost([alive], wanted={ID, "gone"}) == {"gone": "Ray no longer lists it"}
    for one in frozen:
        one.close()


def test_lost_nodes_are_described_in_one_line() -> None:
    lost = {ID: "nothing listens", "fedcba9876543210": "it is silent"}
    assert describe_lost(lost) == "node 01234567 is lost: nothing listens; node fedcba98 is lost: it is silent"
