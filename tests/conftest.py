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
os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported: there is no GPU

import hypothesis
import pytest

hypothesis.settings.register_profile("rayllm", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("rayllm")

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
def _share(file: Path) -> str:
    """What goes to one process: the files that start servers, those that share a Ray, or any other file by itself."""
    text = file.read_text(encoding="utf-8")
    if "pytest.mark.cluster" not in text:
        return str(file)
    return "servers" if "served_process" in text else "ray"


_OPTIONAL_MARKERS = {
    "kernels": "Triton kernels in the interpreter or compiled ahead of time, more than two seconds a file",
    "catalogue": "bad requests against a running server, two minutes",
    "live": "starts real servers and disturbs them, tens of seconds each",
    "slow": "takes a minute or much memory",
}
"""Tests with one of these markers run only where `-m` names it. CI runs the first three as own steps."""


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in _OPTIONAL_MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}; runs where -m names it")


def _skip_optional(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = str(config.getoption("markexpr"))
    for item in items:
        name = next((name for name in reversed(_OPTIONAL_MARKERS) if item.get_closest_marker(name)), None)
        if name is not None and name not in selected:
            item.add_marker(pytest.mark.skip(reason=f"{name}: run it with -m {name}"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest shares first; between them some seconds of other work, so that no two Rays start at one moment."""
    _skip_optional(config, items)
    order = {"servers": 0, str(Path(__file__).parent / "simulation" / "test_simulation.py"): 1, "ray": 2}
    items.sort(key=lambda item: order.get(_share(item.path), 3))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        """Not xdist's own groups: under pytest 9.2 they do nothing."""

        def _split_scope(self, nodeid: str) -> str:
            return _share(config.rootpath / nodeid.split("::")[0])

    return Shares(config, log)


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


@pytest.fixture
def interpreted_kernels() -> Iterator[None]:
    """Tensors on the CPU are computed by Triton's kernels, in an interpreter that is right, where a GPU would be asked.
    In `tests/kernels` the interpreter is corrected for every test."""
    from triton_interpreter import corrected

    from rayllm_kernels.device import interpreted

    with corrected(), interpreted():
        yield


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
