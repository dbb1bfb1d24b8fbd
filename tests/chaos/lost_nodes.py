"""A Ray cluster of several nodes on this machine, a server in it under load, and nodes that are removed or frozen.

with running_nodes(2) as nodes, nodes.serving(model) as served, Load(served.url) as load:
    nodes.remove(nodes.of_rank(served, 0))
    load.finish()
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rayllm.executor.ray_cluster import ensure_ray_token, free_port
from rayllm.machine.processes import Process, descendants

READY_TIMEOUT_S = 150.0
_STORE_BYTES = 80 * 2**20
_HOG = """
import sys, time, logging, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote
class Hog:
    def ready(self): pass

ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
hogs = [Hog.options(num_cpus=float(sys.argv[2]), scheduling_strategy=On(node, soft=False)).remote()
        for node in sys.argv[3:]]
ray.get([hog.ready.remote() for hog in hogs])
print("ready", flush=True)
time.sleep(3600)
"""


class Nodes:
    """A head node, where nothing of an engine has room, and others with 4 CPUs each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        self._cluster: Any = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self._by_id: dict[str, Any] = {}
        self._frozen: list[Process] = []
        self._hogs: list[subprocess.Popen[str]] = []
        self.address: str = self._cluster.address

    def add(self, num_cpus: int = 4) -> str:
        """Starts a node; returns its id."""
        node = self._cluster.add_node(num_cpus=num_cpus, object_store_memory=_STORE_BYTES)
        self._by_id[node.node_id] = node
        return str(node.node_id)

    def ids(self) -> list[str]:
        """All but the head."""
        return list(self._by_id)

    def wait_for(self, command: str) -> str:
        """The node on which a process of this name starts next, or runs."""
        deadline = time.monotonic() + 60
        while True:
            for node_id in self.ids():
                if any(process.command_line().startswith(command) for process in self._processes(node_id)):
                    return node_id
            assert time.monotonic() < deadline, f"no {command} in a minute"
            time.sleep(0.05)

    def fill(self, node_ids: list[str], num_cpus: float) -> None:
        """Takes so many CPUs of each of these nodes, in whole tasks, until the end."""
        command = [sys.executable, "-c", _HOG, self.address, str(num_cpus), *node_ids]
        hog = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._hogs.append(hog)
        assert hog.stdout is not None
        assert hog.stdout.readline() == "ready\n"

    def remove(self, node_id: str) -> None:
        """As a machine that loses its power: all its processes end at once, frozen ones too."""
        family = self._processes(node_id)
        for process in family:
            _signal(process, signal.SIGKILL)
        self._cluster.remove_node(self._by_id.pop(node_id), allow_graceful=False)

    def freeze(self, node_id: str) -> None:
        """Stops all its processes; `close` lets them go on, and ends them."""
        self._frozen = self._processes(node_id)
        for process in self._frozen:
            _signal(process, signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._frozen:
            _signal(process, signal.SIGCONT)

    def _processes(self, node_id: str) -> list[Process]:
        raylet = self._by_id[node_id].all_processes["raylet"][0].process.pid
        root = next(process for process in descendants() if process.pid == raylet)
        return [root, *descendants(raylet)]

    def close(self) -> None:
        for hog in self._hogs:
            hog.kill()
            hog.wait()
            if hog.stdout is not None:
                hog.stdout.close()
        self.thaw()
        # Not in order: each raylet would wait half a minute for the head to hear of its end.
        for node in (self._cluster.head_node, *self._by_id.values()):
            for each in node.all_processes.values():
                for process in (Process(info.process.pid, 0) for info in each):
                    self._end(process)
        with contextlib.suppress(Exception):
            self._cluster.shutdown()

    @staticmethod
    def _end(process: Process) -> None:
        for each in (process, *descendants(process.pid)):
            _signal(each, signal.SIGKILL)

    @contextlib.contextmanager
    def serving(self, model: Path, *flags: str) -> Iterator[Served]:
        """`rayllm serve` in this cluster, ready. Afterwards it is stopped by SIGTERM, and must say so."""
        port = free_port()
        command = [sys.executable, "-m", "rayllm", "serve", str(model), "--port", str(port), *flags]
        with tempfile.TemporaryDirectory(prefix="served-") as folder:
            output = Path(folder) / "output.txt"
            with output.open("wb") as stream:
                environment = {**os.environ, "RAY_ADDRESS": self.address, "RLLM_LOG_DIR": folder}
                process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            served = Served(process, output, f"http://127.0.0.1:{port}")
            try:
                served.wait_ready()
                yield served
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, output.read_text()
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    output: Path
    url: str

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not re.search(r"^URL ", self.output.read_text(), re.MULTILINE):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def nodes(self) -> dict[str, str]:
        """The node of each process, by its role: `driver`, `ingress`, `worker 0` ..."""
        state = httpx.get(f"{self.url}/dashboard/state", timeout=30, trust_env=False).json()
        return {
            f"worker {each['rank']}" if each["rank"] is not None else each["role"]: each["node"]
            for each in state["processes"]
        }

    def health(self) -> tuple[int, str]:
        try:
            answer = httpx.get(f"{self.url}/health", timeout=10, trust_env=False)
        except httpx.HTTPError as error:
            return 0, repr(error)
        return answer.status_code, answer.text


@dataclass
class Load:
    """Streams of greedy and seeded answers, and what a client sees of them."""

    served: Served
    num_streams: int = 6
    num_tokens: int = 200
    texts: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    health: list[tuple[float, int, str]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(self.num_streams + 1)
        self._watch: Future[None] = self._pool.submit(self._watch_health)
        self._streams = [self._pool.submit(self._stream, number) for number in range(self.num_streams)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._pool.shutdown()

    def finish(self) -> None:
        """Waits for all answers; each must have come to its end."""
        self.texts = [stream.result() for stream in self._streams]
        self._done.set()
        self._watch.result()

    def wait_flowing(self, num_chunks: int) -> None:
        """Until so many chunks have come in all."""
        deadline = time.monotonic() + 60
        while len(self.arrivals) < num_chunks:
            assert time.monotonic() < deadline, f"only {len(self.arrivals)} chunks in a minute"
            time.sleep(0.02)

    @property
    def silence(self) -> tuple[float, float]:
        """The longest time without any token: begin and length."""
        times = sorted(self.arrivals)
        gaps = [(begin, end - begin) for begin, end in itertools.pairwise(times)]
        return max(gaps, key=lambda gap: gap[1])

    def _stream(self, number: int) -> str:
        body = {
            "model": "tiny",
            "prompt": f"Once upon a time {number}",
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "temperature": number % 2,
            "seed": number,
            "stream": True,
        }
        text, ended = "", False
        url = f"{self.served.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                assert '"error"' not in line, line
                ended = ended or line == "data: [DONE]"
                self.arrivals.append(time.monotonic())
                text += line
        assert ended, f"stream {number} was cut after {len(text)} characters"
        return re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", text)

    def _watch_health(self) -> None:
        while not self._done.wait(0.1):
            status, said = self.served.health()
            self.health.append((time.monotonic(), status, said))


@contextlib.contextmanager
def running_nodes(num_nodes: int) -> Iterator[Nodes]:
    """A cluster with so many nodes besides its head."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    ensure_ray_token()
    nodes = Nodes()
    try:
        for _ in range(num_nodes):
            nodes.add()
        yield nodes
    finally:
        nodes.close()


def soak_nodes(model: Path, minutes: float, seed: int) -> int:
    """Rounds in which the engine's node is removed or frozen under load, until the time is up; returns how many. A
    failing one says its seed."""
    num_rounds = 0
    with running_nodes(2) as nodes, nodes.serving(model, "--tensor-parallel-size", "2", "--device", "cpu") as served:
        with Load(served) as load:
            load.finish()
        undisturbed, began = load.texts, time.monotonic()
        print(f"undisturbed: longest silence {load.silence[1]:.1f} s", flush=True)
        while time.monotonic() - began < 60 * minutes:
            rng = random.Random(seed + num_rounds)
            kind, moment = rng.choice(["remove", "freeze"]), rng.randrange(1, 600)
            lost = served.nodes()["driver"]
            try:
                with Load(served) as load:
                    load.wait_flowing(moment)
                    lost_at = time.monotonic()
                    (nodes.remove if kind == "remove" else nodes.freeze)(lost)
                    load.finish()
                assert load.texts == undisturbed, "an answer is another than without the fault"
            except BaseException:
                print(f"round {num_rounds} fails ({kind} after {moment} tokens); again: --seed {seed + num_rounds}")
                raise
            told = next((at - lost_at for at, status, _ in load.health if at > lost_at and status != 200), None)
            num_rounds += 1
            print(
                f"{time.monotonic() - began:6.0f} s  round {num_rounds}: {kind} after {moment} tokens, "
                f"silence {load.silence[1]:.1f} s, in /health after {told if told is None else round(told, 1)} s",
                flush=True,
            )
            if kind == "freeze":
                nodes.remove(lost)
            nodes.add()
    print(f"{num_rounds} nodes lost: every answer as without it")
    return num_rounds


def _signal(process: Process, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, sign)
