"""`cluster.yaml` for `ray up`: valid, careful with what it opens, made of paths that exist, and it starts.

`ray up` runs here for real, against a "machine" that is a folder: `ssh` and `rsync` first on PATH run and copy there.
"""

import contextlib
import hashlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rayllm.executor.ray_cluster import free_port
from rayllm.machine.processes import descendants

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 90.0

# Runs a command, and owns all that comes of it: daemons too, whose own parents are gone. When its standard input
# closes, because the test is over or died, it ends every one of them and then itself.
KEEPER = """
import os, subprocess, sys, threading, time
from rayllm.machine.processes import adopt_orphans, descendants, end_all
adopt_orphans()
command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
threading.Thread(target=lambda: print(command.wait(), flush=True), daemon=True).start()
sys.stdin.read()
while left := descendants():
    end_all(left, grace_s=0)
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass
    time.sleep(0.01)
"""

SSH = """#!/bin/sh
while case "$1" in *@*) false ;; esac; do shift; done
shift
export HOME={node}
cd "$HOME" && exec sh -c "$*"
"""

RSYNC = """#!/bin/sh
for last; do source=$target; target=$last; done
target={node}/${{target#*:~/}}
if [ -d "$source" ]; then mkdir -p "$target" && cp -a "$source/." "$target"; else cp -a "$source" "$target"; fi
"""


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read_cluster()


def read_cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_every_ray_start_asks_for_the_token(cluster: dict[str, Any]) -> None:
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "RAY_enable_autoscaler_v2=0" in starts[0]


def test_it_serves_an_app_that_exists(cluster: dict[str, Any]) -> None:
    [deploy] = [command for command in cluster["head_start_ray_commands"] if "serve deploy" in command]
    assert (ROOT / deploy.split()[-1]).is_file()
    assert any("pip install" in command for command in cluster["setup_commands"])


def test_no_folder_in_home_passes_for_our_package(cluster: dict[str, Any]) -> None:
    assert {"~/rayllm", "~/rayllm/"}.isdisjoint(cluster["file_mounts"])


# ------------------------------------------------------------------------------------------------------ ray up, run


@dataclass
class Head:
    """A head that `ray up` started: where it answers, and what it was given."""

    url: str
    dashboard_url: str
    token: str
    home: Path

    def serve_status(self, token: str) -> httpx.Response:
        """What the dashboard answers about Serve to a client with this token."""
        url = f"{self.dashboard_url}/api/serve/applications/"
        return httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)

    def application(self) -> dict[str, Any]:
        """The application named as in the deploy file, as Serve sees it."""
        answer = self.serve_status(self.token)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["applications"]["rayllm"])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """The head of a cluster started from our `cluster.yaml`, once its application answers; all of it ends after."""
    name = f"rayllm-test-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        up = Up(Path(folder), name)
        try:
            yield from up.run()
        finally:
            shutil.rmtree(_ssh_control_folder(name), ignore_errors=True)


class Up:
    """One `ray up` below a folder: the homes of both sides, a checkout, ports that nobody else has."""

    def __init__(self, folder: Path, cluster_name: str):
        self.folder = folder
        self.cluster_name = cluster_name
        self.home, self.node, self.checkout, self.bin = (folder / name for name in ("home", "node", "checkout", "bin"))
        for path in (self.home / ".ray", self.node, self.checkout, self.bin):
            path.mkdir(parents=True)
        self.http_port, self.dashboard_port = free_port(), free_port()
        self.token = secrets.token_hex(32)
        (self.home / ".ray/auth_token").write_text(self.token)
        self.environment = self._write_environment()
        self._write_commands()
        self._write_checkout()

    def run(self) -> Iterator[Head]:
        head = Head(
            url=f"http://127.0.0.1:{self.http_port}",
            dashboard_url=f"http://127.0.0.1:{self.dashboard_port}",
            token=self.token,
            home=self.node,
        )
        with (self.folder / "output").open("wb") as output:
            keeper = subprocess.Popen(
                [sys.executable, "-c", KEEPER, "ray", "up", "-y", "--no-config-cache", "cluster.yaml"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=self.checkout,
                env=self.environment,
                start_new_session=True,  # no terminal: the login shells of `ray up` would take it
            )
        started = set()
        try:
            assert keeper.stdout is not None
            status = keeper.stdout.readline().strip()
            assert status == b"0", f"ray up: {self.said()}"
            self._wait_ready(head)
            started = descendants(keeper.pid)
            assert started
            yield head
        finally:
            keeper.communicate()  # closes its standard input
            assert keeper.returncode == 0
            assert not any(process.is_alive() for process in started)

    def said(self) -> str:
        """What `ray up` printed, and the ends of Serve's logs on the head."""
        logs = [self.folder / "output", *self.folder.glob("ray/session_*/logs/serve/*.log")]
        return "\n".join(f"---- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def _wait_ready(self, head: Head) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_ready(head.url):
            status = head.application()["status"]
            assert status != "DEPLOY_FAILED", self.said()
            assert time.monotonic() < deadline, f"{status} after {READY_TIMEOUT_S:g} s\n{self.said()}"
            time.sleep(0.5)

    def _write_environment(self) -> dict[str, str]:
        """The environment of `ray up`; the head's login shells read theirs from the node's .bashrc."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        common = {"RAY_TMPDIR": str(self.folder), "TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        node = {
            **common,
            "PATH": path,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard_port}",
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in node.items()]
        (self.node / ".bashrc").write_text("".join(lines))
        return {**inherited, **common, "HOME": str(self.home), "PATH": f"{self.bin}:{path}"}

    def _write_commands(self) -> None:
        for name, text in (("ssh", SSH), ("rsync", RSYNC)):
            (self.bin / name).write_text(text.format(node=self.node))
            (self.bin / name).chmod(0o755)

    def _write_checkout(self) -> None:
        """What `ray up` copies to the head: our files, with ports, sizes and a name for this test."""
        shutil.copytree(ROOT / "serve_apps", self.checkout / "serve_apps")
        deployed = self.checkout / "serve_apps/config/chat.yaml"
        deployed.write_text(_replaced(deployed.read_text(), "port: 8000", f"port: {self.http_port}"))

        cluster = {**read_cluster(), "cluster_name": self.cluster_name}
        cluster["setup_commands"] = [line for line in cluster["setup_commands"] if "pip install" not in line]
        commands = [line for line in cluster["head_start_ray_commands"] if "ray stop" not in line]
        ports = f"--port={free_port()} --dashboard-port={self.dashboard_port}"
        ports += f" --dashboard-agent-listen-port={free_port()} --ray-client-server-port={free_port()}"
        ports += " --min-worker-port=0 --max-worker-port=0 --num-cpus=8 --object-store-memory=100000000"
        cluster["head_start_ray_commands"] = [_replaced(commands[0], "--port=6379", ports), *commands[1:]]
        cluster["worker_start_ray_commands"] = []
        (self.checkout / "cluster.yaml").write_text(yaml.safe_dump(cluster))


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    return False


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def _ssh_control_folder(cluster_name: str) -> Path:
    """Where Ray keeps the sockets of ssh: a fixed place, so all that we can do is to tidy up."""
    user, cluster = (hashlib.sha256(word.encode()).hexdigest()[:10] for word in (getuser(), cluster_name))
    return Path(f"/tmp/ray_ssh_{user}/{cluster}")


@pytest.mark.cluster
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="ends what it started with Linux's child subreaper")
class TestRayUp:
    def test_the_built_in_model_answers_over_http(self, head: Head) -> None:
        [model] = httpx.get(f"{head.url}/v1/models", trust_env=False).json()["data"]
        body = {"model": model["id"], "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{head.url}/v1/completions", json=body, timeout=30, trust_env=False)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        assert choice["text"].strip()
        assert answer.json()["usage"]["completion_tokens"] == 8

    def test_the_dashboard_lets_in_who_has_the_token_and_nobody_else(self, head: Head) -> None:
        assert head.serve_status(secrets.token_hex(32)).status_code in (401, 403)
        assert httpx.get(f"{head.dashboard_url}/api/serve/applications/", trust_env=False).status_code == 401
        assert head.application()["status"] == "RUNNING"

    def test_the_token_is_readable_by_its_owner_alone(self, head: Head) -> None:
        assert (head.home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
