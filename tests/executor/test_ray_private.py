"""What RayLLM expects of Ray's private names, on the Ray that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayllm.executor import ray_private


def test_messages_of_raylets_go_where_they_are_redirected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    lines: list[str] = []
    ray_private.redirect_messages(lines.append)
    worker.print_to_stdstream({"lines": ["A worker died.", "Another one."], "pid": 1}, ignore_prefix=True)
    assert lines == ["A worker died.", "Another one."]


def test_workers_get_no_folder_that_this_process_does_not_import_from(tmp_path: Path) -> None:
    from ray.job_config import JobConfig

    config = JobConfig()
    ray_private.keep_working_folder_out(config)
    config._py_driver_sys_path.extend([str(tmp_path), sys.path[-1]])
    assert list(config._get_proto_job_config().py_driver_sys_path) == [sys.path[-1]]


def test_without_a_cluster_on_this_machine_there_is_no_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_private.latest_cluster() is None
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"127.0.0.1:6379"})
    assert ray_private.latest_cluster() == "127.0.0.1:6379"


def test_a_process_without_ray_is_told_so_without_importing_it() -> None:
    code = """
import sys
from rayllm.executor.ray_private import connected_node, read_environment_again

read_environment_again(also_token=True)
assert connected_node() is None
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_names_are_those_of_the_ray_that_is_installed() -> None:
    from ray._private import state, worker
    from ray._private.authentication import authentication_utils
    from ray._raylet import AuthenticationTokenLoader, Config
    from ray.experimental import internal_kv

    for owner, names in (
        (state, ["available_resources_per_node"]),
        (worker, ["_global_node", "print_to_stdstream"]),
        (authentication_utils, ["is_token_auth_enabled"]),
        (AuthenticationTokenLoader, ["instance"]),
        (Config, ["initialize"]),
        (internal_kv, ["_internal_kv_put", "_internal_kv_get", "_internal_kv_del"]),
    ):
        assert not [name for name in names if not hasattr(owner, name)], owner
