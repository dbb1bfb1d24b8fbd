"""Shared fixtures. The environment is set here, before anything heavy is imported."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling
    from xdist.workermanage import Producer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--page-screenshots", metavar="FOLDER", help="write pictures of the pages there")


# ------------------------------------------------------------------------------------ two processes share the suite


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for the whole suite; what is asked for by name runs in this process."""
    return 2 if config.args == config.getini("testpaths") else 0


@functools.cache
def _starts_ray(file: Path) -> bool:
    return "pytest.mark.cluster" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start Ray go first: they take the longer half of the time."""
    items.sort(key=lambda item: not _starts_ray(item.path))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class RayApart(LoadScopeScheduling):
        """All files that start Ray to one process, one Ray at a time; the others file by file. (xdist's own groups do
        nothing under pytest 9.2.)"""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if _starts_ray(config.rootpath / file) else file

    return RayApart(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Reports travel as UTF-8: what a test logged may hold halves of characters."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_sendable(key): _sendable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_sendable, value))
    return value


# -------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint with a tokenizer."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("llama"), architecture="llama")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole run: eight logical CPUs, loopback only."""
    import ray

    from rayllm.executor.ray_cluster import quieten_ray

    quieten_ray()
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            namespace="tests",
            _temp_dir=temp_dir,
        )
        yield
        ray.shutdown()
