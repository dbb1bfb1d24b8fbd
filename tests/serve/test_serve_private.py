"""The sockets that Serve opens in a replica: which address, which buffers; with fakes of what Serve calls."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import context
from ray.serve._private import replica

from rayllm.serve.serve_private import prepare_replica_sockets, serve_address


class _Server:
    """Stands for uvicorn's."""

    def __init__(self) -> None:
        self.sockets: Sequence[socket.socket] | None = None

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        self.sockets = sockets


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serve's two functions, replaced; the addresses that its gRPC server gets."""
    addresses: list[str] = []

    async def start(server: _Server) -> tuple[str, _Server]:
        return "task", server

    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: addresses.append(address) or 1)
    monkeypatch.setattr(replica, "start_asgi_http_server", start)
    return addresses


@pytest.mark.parametrize(("is_loopback_only", "address"), [("0", "127.0.0.1:0"), ("1", "[::]:0")])
def test_the_grpc_port_listens_on_loopback_where_the_cluster_is_one_machine(
    is_loopback_only: str, address: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", is_loopback_only)
    prepare_replica_sockets()
    assert replica.add_port_to_grpc_server(object(), "[::]:0") == 1
    assert opened == [address]


async def test_http_connections_get_a_small_send_buffer(opened: list[str]) -> None:
    prepare_replica_sockets()
    task, server = await replica.start_asgi_http_server(_Server())
    assert task == "task"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        await server.startup(sockets=[listener])
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 16 * 1024 != before
        assert server.sockets == [listener]


def test_functions_are_wrapped_once_however_often_it_is_called(opened: list[str]) -> None:
    prepare_replica_sockets()
    wrapped = replica.start_asgi_http_server
    prepare_replica_sockets()
    assert replica.start_asgi_http_server is wrapped
    assert asyncio.iscoroutinefunction(wrapped)


def test_a_serve_without_the_functions_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add_port_to_grpc_server", "start_asgi_http_server"):
        assert hasattr(replica, name), "this Ray has it"
        monkeypatch.delattr(replica, name)
    prepare_replica_sockets()
    assert not hasattr(replica, "start_asgi_http_server")


def test_serves_address_is_that_of_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = SimpleNamespace(http_config=SimpleNamespace(host="127.0.0.1", port=8123))
    monkeypatch.setattr(context, "_get_global_client", lambda: client)
    assert serve_address() == ("127.0.0.1", 8123)
