from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rayllm.engine.address import DriverAddress
from rayllm.engine.client.endpoint import client_name, endpoint
from rayllm.errors import EngineUnreachableError


def test_the_unix_socket_is_used_where_it_exists_here(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    assert endpoint(DriverAddress("node", f"{tmp_path}/s", "token", "10.0.0.1", 7)) == f"{tmp_path}/s"


def test_tcp_is_used_where_the_unix_socket_is_on_another_node(tmp_path: Path) -> None:
    assert endpoint(DriverAddress("node", f"{tmp_path}/none", "token", "10.0.0.1", 7)) == ("10.0.0.1", 7)


def test_an_address_that_cannot_be_reached_from_here_names_node_and_path(tmp_path: Path) -> None:
    with pytest.raises(EngineUnreachableError, match=rf"node 01234567 listens at {tmp_path}/none"):
        endpoint(DriverAddress("0123456789", f"{tmp_path}/none", "token"))


def test_a_client_is_called_by_its_host_and_process() -> None:
    assert client_name() == f"{socket.gethostname()}:{os.getpid()}"
