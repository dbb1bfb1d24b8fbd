from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayllm.config import Environment
from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.executor import ray_cluster
from rayllm.executor.ray_cluster import check_reachable, connected_ray, running_cluster


@pytest.mark.parametrize(("value", "address"), [("", None), ("local", None), (" auto ", "auto"), ("h:6379", "h:6379")])
def test_only_an_address_is_a_cluster_to_join(value: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert Environment.ray_address() == address


def _unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_is_looked_at_before_ray_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_reachable(f"127.0.0.1:{listener.getsockname()[1]}")
    for address in (_unused_address(), "no.such.host.invalid:6379", "127.0.0.1:99999"):
        with pytest.raises(EngineUnreachableError, match=rf"at RAY_ADDRESS='{address}' \(.+\): start one there with"):
            check_reachable(address)
    with pytest.raises(ConfigError, match="RAY_ADDRESS='head' is not an address: give auto, or HOST:PORT"):
        check_reachable("head")
    with pytest.raises(ConfigError, match="Ray Client"):
        check_reachable("ray://head:10001")


def test_auto_is_the_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    found = _unused_address()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {found})
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    assert running_cluster() == found
    monkeypatch.setattr(ray_cluster, "ray_is_initialized", lambda: False)  # other tests may be connected
    with pytest.raises(EngineUnreachableError, match=f"'{found}'"), connected_ray(num_cpus=1):
        pass
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    with pytest.raises(EngineUnreachableError, match=r"'auto' \(none runs on this machine\): start one there"):
        running_cluster()


def test_a_program_that_has_imported_ray_asks_for_the_token_that_its_ray_wants() -> None:
    code = """
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode
from rayllm.executor.ray_cluster import prepare_environment

assert get_authentication_mode() == AuthenticationMode.DISABLED
prepare_environment(own_cluster=True)
assert get_authentication_mode() == AuthenticationMode.TOKEN
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_an_engine_for_a_cluster_that_is_not_there_says_so_in_one_line(llama_path: Path) -> None:
    code = f"import rayllm; rayllm.LLM({str(llama_path)!r}, distributed_executor_backend='ray')"
    address = _unused_address()
    began_s = time.monotonic()
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "rayllm", "serve", str(llama_path)]):
        environment = {**os.environ, "RAY_ADDRESS": address}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert f"no Ray cluster answers at RAY_ADDRESS='{address}'" in ended.stderr.splitlines()[-1]
    assert (ended.returncode, len(ended.stderr.splitlines())) == (3, 1)
    assert time.monotonic() - began_s < 60
