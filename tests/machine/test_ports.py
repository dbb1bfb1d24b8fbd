from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rayllm.errors import ConfigError
from rayllm.machine import ports
from rayllm.machine.ports import check_port, port_holder
from rayllm.machine.registry import listed


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")]
)
def test_a_process_that_listens_is_named_with_its_command(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        assert port_holder(port).startswith(f"pid {os.getpid()} (")
        with pytest.raises(ConfigError, match=rf"port={port} on {host} is in use by pid {os.getpid()} \(.*--port 0"):
            check_port(host, port)


def test_a_server_of_ours_is_named_as_such(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with listed("serve", name="mine", model="m", url=url, log=tmp_path / "log", shutdown_timeout_s=1.0):
            assert port_holder(port) == f"the rayllm server 'mine' (pid {os.getpid()}, model m)"


def test_who_cannot_be_known_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(ports, "_listening_sockets", lambda port: ["1"])  # of a process that is another user's
        assert port_holder(port) == ""
        with pytest.raises(ConfigError, match=rf"port={port} on 127.0.0.1 is in use: choose another with --port"):
            check_port("127.0.0.1", port)


def test_a_taken_port_is_refused_with_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--port 0"):
        check_port("127.0.0.1", taken.getsockname()[1])


def test_a_port_used_a_moment_ago_is_free_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            accepted.close()  # this side closes first and keeps the port in TIME_WAIT
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        check_port(host, 0)
