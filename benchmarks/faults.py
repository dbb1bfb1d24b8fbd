"""What a worker's death costs: how soon it is noticed, how long clients see nothing, how much is computed again.

    python benchmarks/faults.py [--model FOLDER] [--num-faults 100] [--hang-share 0.3] [--standby off process weights]

An engine of two ranks in a Ray of its own serves 4 requests at a time over the driver's socket. While they run, a rank
(each in turn) is killed, or stopped (`--hang-share` of the faults). The faults are divided among the standby modes; a
standby is waited for before the next one. Detection is from the signal until the driver's stats show the fault,
asked for every 5 ms. The gap is the longest silence of any stream that the fault fell into. Each answer must be the
undisturbed one's, else the benchmark fails. Prints a table, where the time went (means, in seconds) and one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from rayllm.cli.random_model import random_model
from rayllm.config import EngineConfig
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.owner.driver_handle import DriverHandle, create_driver
from rayllm.engine.owner.resolve import resolve
from rayllm.executor.ray_cluster import connected_ray
from rayllm.request import Request, SamplingParams, pack_ids, unpack_ids

NUM_STREAMS = 4
NUM_TOKENS = 200
STANDBY_TIMEOUT_S = 60.0
MODES = ("off", "process", "weights")
SIGNALS = {"crash": signal.SIGKILL, "hang": signal.SIGSTOP}


@dataclass
class Fault:
    """One fault as seen from outside."""

    kind: str
    detection_s: float = 0.0
    gap_s: float = 0.0
    num_recomputed_tokens: int = 0
    stages_s: dict[str, float] = field(default_factory=dict)
    """As the driver saw it."""


@dataclass
class Streams:
    """The tokens of one load, and when the last of each stream came."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    last_at: dict[int, float] = field(default_factory=dict)
    gap_s: float = 0.0


def _requests() -> list[Request]:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [
        Request(request_id=str(i), prompt=pack_ids([5 + i] * 40), params=params, seed=7 + i, max_tokens=NUM_TOKENS)
        for i in range(NUM_STREAMS)
    ]


def _connect(running: DriverHandle) -> BlockingDriverConnection:
    import ray

    return BlockingDriverConnection(ray.get(running.driver.address.remote()))


def _load(client: BlockingDriverConnection, first: int, moment: int | None = None, fault: Any = None) -> Streams:
    """Runs the requests; calls `fault` when `moment` tokens have come."""
    streams, num_open, num_tokens = Streams(), NUM_STREAMS, 0
    for i, request in enumerate(_requests()):
        client.submit(first + i, request)
        streams.tokens[i] = []
    while num_open:
        for delta in client.receive():
            now, i = time.monotonic(), delta.stream - first
            if delta.finish is not None and delta.finish.reason != "length":
                raise SystemExit(f"a request was lost: {delta.finish}")
            if i in streams.last_at and moment is None:
                streams.gap_s = max(streams.gap_s, now - streams.last_at[i])
            streams.last_at[i] = now
            streams.tokens[i] += unpack_ids(delta.token_ids)
            num_tokens += len(delta.token_ids) // 4
            num_open -= delta.finish is not None
        if moment is not None and num_tokens >= moment:
            moment = None
            fault()
    return streams


def _one(running: DriverHandle, client: BlockingDriverConnection, kind: str, number: int, expected: Streams) -> Fault:
    import ray

    pid = ray.get(running.driver.describe.remote()).workers[number % 2].pid
    watcher, before, found = _connect(running), client.stats(), Fault(kind)
    threads: list[threading.Thread] = []

    def watch(began: float) -> None:
        while watcher.stats(60.0).num_faults == before.num_faults:
            time.sleep(0.005)
        found.detection_s = time.monotonic() - began

    def fault() -> None:
        os.kill(pid, SIGNALS[kind])
        threads.append(threading.Thread(target=watch, args=(time.monotonic(),)))
        threads[0].start()

    moment = random.Random(number).randrange(NUM_STREAMS, NUM_STREAMS * NUM_TOKENS * 2 // 3)
    streams = _load(client, 1000 * (number + 1), moment, fault)
    threads[0].join()
    watcher.close()
    if streams.tokens != expected.tokens:
        raise SystemExit("an answer is another than without a fault")
    found.gap_s = streams.gap_s
    after = client.stats()
    found.num_recomputed_tokens = after.num_recomputed_tokens - before.num_recomputed_tokens
    found.stages_s = after.recovery_s
    return found


def _await_standby(running: DriverHandle) -> None:
    import ray

    deadline = time.monotonic() + STANDBY_TIMEOUT_S
    while not ray.get(running.driver.describe.remote()).standby_is_ready:
        if time.monotonic() > deadline:
            raise SystemExit(f"no standby was ready within {STANDBY_TIMEOUT_S:g} s")
        time.sleep(0.1)


def _measure(model: str, standby: str, kinds: list[str]) -> list[Fault]:
    """One fault after the other, of these kinds."""
    settings: dict[str, Any] = {"model": model, "tensor_parallel_size": 2, "device": "cpu", "standby": standby}
    # float32: in bfloat16 a token may depend on who else is in the batch.
    config = EngineConfig(**settings, name="faults", dtype="float32", max_model_len=512, num_kv_blocks=400)
    resolved = resolve(config, num_gpus=0, num_cores=os.cpu_count() or 1, backend="ray")
    with connected_ray(num_cpus=4):
        running = create_driver(resolved)
        try:
            running.start(resolved)
            client = _connect(running)
            expected = _load(client, 0)
            faults = []
            for number, kind in enumerate(kinds):
                if standby != "off":
                    _await_standby(running)
                faults.append(_one(running, client, kind, number, expected))
            client.close()
        finally:
            running.close()
    return faults


def _kinds(num_faults: int, hang_share: float) -> list[str]:
    """Hangs spread evenly among crashes."""
    return ["hang" if int((i + 1) * hang_share) > int(i * hang_share) else "crash" for i in range(num_faults)]


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def _summary(standby: str, kind: str, faults: list[Fault]) -> dict[str, Any]:
    detections, gaps = [fault.detection_s for fault in faults], [fault.gap_s for fault in faults]
    return {
        "standby": standby,
        "kind": kind,
        "num_faults": len(faults),
        "detection_p50_s": _quantile(detections, 0.5),
        "detection_p99_s": _quantile(detections, 0.99),
        "gap_p50_s": _quantile(gaps, 0.5),
        "gap_p99_s": _quantile(gaps, 0.99),
        "gap_max_s": round(max(gaps), 3),
        "recomputed_tokens_mean": round(statistics.mean(fault.num_recomputed_tokens for fault in faults), 1),
        "stages_s": {
            stage: round(statistics.mean(fault.stages_s.get(stage, 0.0) for fault in faults), 3)
            for stage in dict.fromkeys(stage for fault in faults for stage in fault.stages_s)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--num-faults", type=int, default=30, help="in all, divided among the standby modes")
    parser.add_argument("--hang-share", type=float, default=0.3, help="of the faults; the others are crashes")
    parser.add_argument("--standby", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    model = options.model
    if model.startswith("random:"):
        model = str(random_model(model, with_weights=True))
    rows = []
    for standby in options.standby:
        kinds = _kinds(-(-options.num_faults // len(options.standby)), options.hang_share)
        faults = _measure(model, standby, kinds)
        for kind in SIGNALS:
            if kind in kinds:
                rows.append(_summary(standby, kind, [fault for fault in faults if fault.kind == kind]))
                stages = rows[-1]["stages_s"]
                print("  ".join(f"{name}={value}" for name, value in rows[-1].items() if name != "stages_s"))
                print("    " + ", ".join(f"{stage} {seconds}" for stage, seconds in stages.items()), flush=True)
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    print(json.dumps({"benchmark": "faults", "model": options.model, "rows": rows, **machine}))


if __name__ == "__main__":
    main()
