"""What an engine does with more work than it can do: open-loop Poisson arrivals at parts and multiples of its capacity.

    python benchmarks/overload.py [--model FOLDER] [--seconds 20] [--factors 0.5 1 2 4] [--timeout 4] [--driver]

One engine in this process, no Ray, no HTTP; there, a refusal waits for the step that this one thread computes. With
`--driver`, a driver and a worker in processes of their own, spoken to over the driver's socket, as a server's ingress
does. Each run lasts `--seconds` and two more, and so does the one that measures capacity, which comes first, with a
queue that never empties. Then requests arrive whether or not others have ended, each with a deadline `--timeout`
seconds after it came. Goodput counts the output tokens of requests that ended in time. Refusal latency is from the
moment a request was due to its refusal. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.demo import model_path
from rayllm.engine.address import DriverAddress
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.driver_handle import create_driver
from rayllm.engine.owner.local import build_scheduler
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import EngineError
from rayllm.executor.inproc import InprocExecutor
from rayllm.executor.ray_cluster import connected_ray
from rayllm.messages import Deltas, DriverMessage, EngineStats, Submit
from rayllm.request import Request, SamplingParams, pack_ids

_WARM_UP_S = 2.0
_LOOK_S = 0.1


@dataclass
class Sent:
    due_s: float
    num_tokens: int = 0


@dataclass
class Outcome:
    """What became of the requests of one run."""

    good_tokens: int = 0
    num_good: int = 0
    latencies_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    num_refused_without_wait: int = 0
    num_expired: int = 0
    max_waiting: int = 0


class Loop(Protocol):
    """What `Engine` asks of an `EngineLoop`."""

    def submit(self, client: str, message: Submit) -> None: ...

    def client_gone(self, client: str) -> None: ...

    def step(self) -> bool: ...

    def stats(self) -> EngineStats: ...


class DriverLoop:
    """A driver, spoken to as if it were a loop. What it says is taken by a thread."""

    def __init__(self, address: DriverAddress, outbox: Callable[[str, DriverMessage], None]):
        self._address, self._outbox = address, outbox
        self._stats_connection = BlockingDriverConnection(address)
        self._connection = self._connect()

    def submit(self, client: str, message: Submit) -> None:
        self._connection.submit(message.stream, message.request)

    def client_gone(self, client: str) -> None:
        self._connection.close()
        while (stats := self.stats()).num_running or stats.num_waiting:
            time.sleep(0.01)
        self._connection = self._connect()

    def step(self) -> bool:
        time.sleep(0.001)
        return False

    def stats(self) -> EngineStats:
        return self._stats_connection.stats()

    def close(self) -> None:
        self._connection.close()
        self._stats_connection.close()

    def _connect(self) -> BlockingDriverConnection:
        connection = BlockingDriverConnection(self._address)
        threading.Thread(target=self._receive, args=(connection,), daemon=True).start()
        return connection

    def _receive(self, connection: BlockingDriverConnection) -> None:
        with contextlib.suppress(EngineError):  # the end of the connection
            while True:
                deltas = connection.receive()
                if connection is self._connection:
                    self._outbox("bench", Deltas(deltas))


class Engine:
    """A loop, and what came of each request."""

    def __init__(self, make_loop: Callable[[Callable[[Any, DriverMessage], None]], Loop], vocab_size: int, seed: int):
        self.loop = make_loop(self._take)
        self.outcome = Outcome()
        self.count_from_s = 0.0
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._open: dict[int, Sent] = {}
        self._num_sent = 0

    def submit(self, due_s: float, timeout_s: float | None) -> None:
        rng, stream = self._rng, self._num_sent
        self._num_sent += 1
        prompt = pack_ids(rng.randrange(3, self._vocab_size) for _ in range(rng.randint(16, 96)))
        num_tokens = rng.randint(16, 48)
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self._open[stream] = Sent(due_s)
        deadline_s = None if timeout_s is None else due_s + timeout_s
        request = Request(
            request_id=str(stream),
            prompt=prompt,
            params=params,
            seed=stream,
            max_tokens=num_tokens,
            deadline_s=deadline_s,
        )
        self.loop.submit("bench", Submit(stream, request))

    def _take(self, client: object, message: DriverMessage) -> None:
        assert isinstance(message, Deltas)
        now, outcome = time.time(), self.outcome
        for delta in message.deltas:
            sent = self._open.get(delta.stream)
            if sent is None:
                continue  # of a run that is over
            sent.num_tokens += len(delta.token_ids) // 4
            if delta.finish is None:
                continue
            del self._open[delta.stream]
            if sent.due_s < self.count_from_s and delta.finish.reason == "error":
                continue
            if delta.finish.code == "overloaded":
                outcome.refusals_s.append(now - sent.due_s)
                outcome.num_refused_without_wait += not delta.finish.retry_after_s
            elif delta.finish.code == "deadline_exceeded":
                outcome.num_expired += 1
            elif now >= self.count_from_s:
                assert delta.finish.reason == "length", delta.finish
                outcome.num_good += 1
                outcome.good_tokens += sent.num_tokens
                outcome.latencies_s.append(now - sent.due_s)

    def clear(self) -> None:
        """Leaves what is under way, and forgets what came of the rest."""
        self.loop.client_gone("bench")
        self._open.clear()
        while self.loop.step():
            pass
        self.outcome = Outcome()

    def capacity(self, seconds: float) -> float:
        """Requests a second with a queue that never empties."""
        began_s = time.time()
        self.count_from_s = began_s + _WARM_UP_S
        end_s = self.count_from_s + seconds
        while time.time() < end_s:
            while len(self._open) < 64:
                self.submit(time.time(), None)
            self.loop.step()
        return self.outcome.num_good / seconds

    def overload(self, requests_per_s: float, seconds: float, timeout_s: float) -> None:
        """Poisson arrivals; what is under way at the end is left."""
        began_s = looked_s = time.time()
        self.count_from_s = began_s + _WARM_UP_S
        end_s = self.count_from_s + seconds
        due_s = began_s
        while (now := time.time()) < end_s:
            while due_s <= now:
                self.submit(due_s, timeout_s)
                due_s += self._rng.expovariate(requests_per_s)
            if now - looked_s >= _LOOK_S:
                looked_s = now
                self.outcome.max_waiting = max(self.outcome.max_waiting, self.loop.stats().num_waiting)
            if not self.loop.step():
                time.sleep(max(0.0, min(due_s - time.time(), 0.01)))


def percentile(values: list[float], share: float) -> float | None:
    values = sorted(values)
    return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 1) if values else None


def peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def random_checkpoint(folder: str) -> Path:
    """A small Llama with random weights, where the built-in model is not there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Path(folder)


def measure_here(config: ResolvedConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    executor = InprocExecutor.load(config)
    scheduler = build_scheduler(config, executor.num_blocks)
    report = measure(Engine(partial(EngineLoop, config, scheduler, executor), config.shape.vocab_size, 0), arguments)
    executor.close()
    return report


def measure_driver(config: ResolvedConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    with connected_ray(num_cpus=4):
        import ray  # which reads the environment when it is imported

        running = create_driver(config)
        try:
            running.start(config)
            address = ray.get(running.driver.address.remote())
            return measure(Engine(partial(DriverLoop, address), config.shape.vocab_size, 0), arguments)
        finally:
            running.close()


def measure(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    capacity = engine.capacity(arguments.seconds)
    report: dict[str, Any] = {"capacity_requests_per_s": round(capacity, 2), "runs": {}}
    print(f"{'load':>5} {'goodput tok/s':>14} {'in time':>8} {'refused':>8} {'expired':>8} {'refusal p50/p99 ms':>20}")
    for factor in arguments.factors:
        engine.clear()
        engine.overload(factor * capacity, arguments.seconds, arguments.timeout)
        outcome = engine.outcome
        p50, p99 = percentile(outcome.refusals_s, 0.5), percentile(outcome.refusals_s, 0.99)
        run = {
            "goodput_tokens_per_s": round(outcome.good_tokens / arguments.seconds, 1),
            "num_in_time": outcome.num_good,
            "num_refused": len(outcome.refusals_s),
            "num_refused_without_wait": outcome.num_refused_without_wait,
            "num_expired": outcome.num_expired,
            "latency_p50_ms": percentile(outcome.latencies_s, 0.5),
            "latency_p99_ms": percentile(outcome.latencies_s, 0.99),
            "refusal_p50_ms": p50,
            "refusal_p99_ms": p99,
            "max_waiting": outcome.max_waiting,
            "peak_rss_mib": peak_mib(),
        }
        report["runs"][f"{factor:g}x"] = run
        print(
            f"{factor:>4g}x {run['goodput_tokens_per_s']:>14} {outcome.num_good:>8} {len(outcome.refusals_s):>8} "
            f"{outcome.num_expired:>8} {f'{p50} / {p99}':>20}"
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint; default: the built-in model, else random weights")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--timeout", type=float, default=4.0)
    parser.add_argument("--driver", action="store_true", help="driver and worker as processes, as a server has them")
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-queued-requests", type=int, default=1024)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        built_in = model_path()
        model = arguments.model or str(built_in if built_in.is_dir() else random_checkpoint(folder))
        settings = EngineConfig(
            model=model,
            tokenizer=model,
            name="overload",
            distributed_executor_backend="ray" if arguments.driver else "inproc",
            max_num_seqs=arguments.max_num_seqs,
            num_kv_blocks=1024,
            max_queued_requests=arguments.max_queued_requests,
        )
        report = (measure_driver if arguments.driver else measure_here)(resolve(settings), arguments)
    goodput = {factor: run["goodput_tokens_per_s"] for factor, run in report["runs"].items()}
    if goodput.get("1x") and "4x" in goodput:
        report["goodput_4x_of_1x"] = round(goodput["4x"] / goodput["1x"], 3)
    settings_used = {name: value for name, value in vars(arguments).items() if name != "model"}
    model_name = Path(model).name if arguments.model or built_in.is_dir() else "random weights"
    environment = {"model": model_name, "python": platform.python_version()}
    print(json.dumps({"benchmark": "overload", **settings_used, **environment, **report}))


if __name__ == "__main__":
    main()
