"""`rayllm serve` as a person starts it, in processes of its own, for as long as a test needs it.

    with running_serve(str(model), "--served-model-name", "tiny") as served:
        served.client.get("/v1/models")          # httpx, at the server's address, with its key
        served.url, served.processes, served.log_text()

A start costs 10 to 20 seconds. A test that needs no real process takes the app itself (`serve.served`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from rayllm.machine.processes import Process, descendants

READY_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 90.0


@dataclass
class ServedProcess:
    """A server that was ready, and what it looked like then."""

    process: subprocess.Popen[bytes]
    output: Path
    """What the command printed; its log files are beside it."""
    errors: Path
    """The same on its standard error."""
    client: httpx.Client
    """At the server's address, with its key where it has one; waits a minute."""
    port: int = 0
    processes: frozenset[Process] = field(default=frozenset())
    """Controller, proxy, replicas, driver and workers."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        """All that the command printed."""
        return self.output.read_text(errors="replace") + self.errors.read_text(errors="replace")

    def pids(self, name: str = "") -> list[int]:
        """Processes below the server whose command line starts with `name`, such as "ray::WorkerActor"."""
        return sorted(each.pid for each in descendants(self.process.pid) if each.command_line().startswith(name))

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        values = [line.rsplit(" ", 1)[1] for line in self._metrics() if line.startswith((name + "{", name + " "))]
        assert values, f"no {name} at /metrics"
        return sum(map(float, values))

    def _metrics(self) -> list[str]:
        return self.client.get("/metrics").text.splitlines()

    def listeners(self) -> set[tuple[str, int, str]]:
        """(address, port, command) of every TCP socket on which a process of the server listens."""
        commands: dict[str, str] = {}
        for each in (Process(self.process.pid, 0), *descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{each.pid}/fd").iterdir():
                    commands[os.readlink(link)] = each.command_line()
        found = set()
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                command = commands.get(f"socket:[{fields[9]}]")
                if fields[3] == "0A" and command is not None:
                    address, _, port = fields[1].partition(":")
                    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                    found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16), command))
        return found

    def is_unharmed(self) -> bool:
        """Whether every process of the beginning still runs."""
        return all(process.is_alive() for process in self.processes)


@contextlib.contextmanager
def running_serve(
    *flags: str, env: Mapping[str, str] | None = None, api_key: str | None = None
) -> Iterator[ServedProcess]:
    """`rayllm serve *flags --port 0`, ready, with a Ray of its own. `env` is added to the environment.

    Afterwards it is stopped by SIGTERM: it must say so, return 0 within its time and leave no process behind, unless
    the test has ended it itself.
    """
    keys = ("--api-key", api_key) if api_key else ()
    command = [sys.executable, "-m", "rayllm", "serve", *flags, "--port", "0", *keys]
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    with tempfile.TemporaryDirectory(prefix="served-") as folder, contextlib.ExitStack() as resources:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RLLM_LOG_DIR": folder, **(env or {})}
        output, errors = Path(folder) / "output.txt", Path(folder) / "errors.txt"
        streams = [resources.enter_context(path.open("wb")) for path in (output, errors)]
        client = resources.enter_context(httpx.Client(headers=headers, timeout=60, trust_env=False))
        process = subprocess.Popen(command, env=environment, stdout=streams[0], stderr=streams[1])
        served = ServedProcess(process, output, errors, client)
        try:
            _wait_ready(served)
            served.processes = _actors(process.pid)
            yield served
            if process.poll() is None:
                _stop(served)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait_ready(served: ServedProcess) -> None:
    """Until the command says where it answers, and does."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (said := re.search(r"^URL +http://127\.0\.0\.1:(\d+)/v1$", served.log_text(), re.MULTILINE)):
        assert served.process.poll() is None, f"the server ended: {served.log_text()}"
        assert time.monotonic() < deadline, f"not ready within {READY_TIMEOUT_S:g} s: {served.log_text()}"
        time.sleep(0.05)
    served.port = int(said[1])
    served.client.base_url = httpx.URL(served.url)
    assert served.client.get("/health").status_code == 200


def _actors(root: int) -> frozenset[Process]:
    commands = {each: each.command_line() for each in descendants(root)}
    return frozenset(
        each for each, line in commands.items() if line.startswith("ray::") and not line.startswith("ray::IDLE")
    )


def _stop(served: ServedProcess) -> None:
    """By SIGTERM, and looks that nothing is left."""
    family = descendants(served.process.pid)
    assert {"raylet", "gcs_server"} <= {each.command() for each in family}
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(STOP_TIMEOUT_S) == 0, served.log_text()
    left = [each.command_line() for each in family if each.is_alive()]
    assert not left, f"still there: {left}"
    assert served.output.read_text().splitlines()[-1] == "stopped"
    assert served.errors.read_text() == ""
