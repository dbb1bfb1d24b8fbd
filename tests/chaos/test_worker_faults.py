"""Real workers, really killed and stopped, under a mixed load: clients must not be able to tell, but by the clock."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rayllm.config import EngineConfig
from rayllm.engine.client import BlockingConnection
from rayllm.engine.driver import RunningEngine, create_driver
from rayllm.engine.resolve import resolve
from rayllm.messages import EngineStats, Finish, TokenLogprobs
from rayllm.request import Request, SamplingParams, pack_ids, unpack_ids

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

SHARED = list(range(40, 80))


def _request(prompt: list[int], **params: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True, **params})
    assert sampling.max_tokens is not None
    return Request(
        request_id="r",
        prompt=pack_ids(prompt),
        params=sampling,
        seed=sampling.seed or 0,
        max_tokens=sampling.max_tokens,
    )


LOAD = [
    _request([5, 6, 7], n=3, temperature=1.0, seed=3),
    _request([9] * 150, logprobs=2),
    _request([8, 9, 10], temperature=0.9, top_p=0.9, seed=4, stop_token_ids=(200, 201, 202, 203), ignore_eos=False),
    _request([11, 12], temperature=0.7, seed=5, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    _request([*SHARED, 1], prompt_logprobs=1, max_tokens=30),
    _request([*SHARED, 2], logprobs=1, max_tokens=90),
    _request([*SHARED, 3], temperature=1.0, top_k=20, seed=6),
]


@dataclass
class Answer:
    """What a client has of one choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)

    def exact(self) -> tuple[Any, ...]:
        """All that must be the same to the bit; log-probabilities may differ by how their batch was rounded."""
        ids = [(one.ids, one.rank) for one in (*self.logprobs, *self.prompt_logprobs)]
        return self.tokens, ids, self.finishes


class Engine:
    """A running engine of two ranks and one client of it."""

    def __init__(self, path: Path):
        settings = {"tensor_parallel_size": 2, "device": "cpu", "num_kv_blocks": 200, "max_num_seqs": 16}
        config = EngineConfig(model=str(path), name="chaos", max_model_len=256, max_num_batched_tokens=64, **settings)
        resolved = resolve(config, num_gpus=0, num_cores=2, backend="ray")
        self.running: RunningEngine = create_driver(resolved)
        self.pids: set[int] = set()
        self.next_stream = 0
        try:
            self.running.start(resolved)
            self.client = self.connect()
        except BaseException:
            self.running.close()
            raise

    def connect(self) -> BlockingConnection:
        import ray

        return BlockingConnection(ray.get(self.running.driver.address.remote()))

    def worker_pids(self) -> list[int]:
        import ray

        description = ray.get(self.running.driver.describe.remote())
        pids = [place.pid for place in description.workers]
        self.pids |= {*pids, description.driver.pid}
        return pids

    def run(self, moment: int | None = None, fault: Callable[[], None] = lambda: None) -> list[Answer]:
        """The load's answers; `fault` happens when `moment` tokens have come."""
        answers: dict[int, Answer] = {}
        for request in LOAD:
            self.client.submit(self.next_stream, request)
            answers |= {self.next_stream + choice: Answer() for choice in range(request.params.n)}
            self.next_stream += request.params.n
        num_tokens = 0
        while not all(answer.finishes for answer in answers.values()):
            for delta in self.client.receive():
                answer = answers[delta.stream]
                assert not answer.finishes, "a delta after the end"
                answer.tokens += unpack_ids(delta.token_ids)
                answer.logprobs += delta.logprobs or []
                answer.prompt_logprobs += delta.prompt_logprobs or []
                answer.finishes += [delta.finish] if delta.finish else []
                num_tokens += len(delta.token_ids) // 4
            if moment is not None and num_tokens >= moment:
                moment = None
                fault()
        assert moment is None or num_tokens < moment, "the fault never came"
        return list(answers.values())


@pytest.fixture(scope="module")
def engine(ray_cluster: None, llama_path: Path) -> Iterator[Engine]:
    engine = Engine(llama_path)
    yield engine
    engine.worker_pids()
    engine.client.close()
    engine.running.close()
    assert not [pid for pid in engine.pids if os.path.exists(f"/proc/{pid}")], "a process was left behind"


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> list[Answer]:
    answers = engine.run()
    assert [len(answer.tokens) for answer in answers[:4]] == [60] * 4
    return answers


def _check(engine: Engine, undisturbed: list[Answer], moment: int, fault: Callable[[], None]) -> EngineStats:
    before = engine.client.stats()
    answers = engine.run(moment, fault)
    stats = engine.client.stats()
    assert stats.healthy, stats.reason
    for number, (answer, expected) in enumerate(zip(answers, undisturbed, strict=True)):
        assert answer.exact() == expected.exact(), f"choice {number} is another than without a fault"
    assert not stats.recovering
    assert stats.num_faults > before.num_faults
    assert stats.num_replays > before.num_replays
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    return stats


def _moment(undisturbed: list[Answer], seed: int) -> int:
    total = sum(len(answer.tokens) for answer in undisturbed)
    return random.Random(seed).randrange(1, total * 2 // 3)


@pytest.mark.parametrize(("rank", "sign"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_worker_killed_or_stopped_changes_no_answer(
    engine: Engine, undisturbed: list[Answer], rank: int, sign: signal.Signals
) -> None:
    before = engine.worker_pids()
    _check(engine, undisturbed, _moment(undisturbed, 10 * rank + sign), lambda: os.kill(before[rank], sign))
    after = engine.worker_pids()
    assert after[1 - rank] == before[1 - rank], "the survivor was not kept"
    assert not os.path.exists(f"/proc/{before[rank]}")  # also one that was stopped: nobody can wake it


def test_a_second_fault_while_the_first_is_mended_changes_no_answer(engine: Engine, undisturbed: list[Answer]) -> None:
    first, second = engine.worker_pids()
    watcher = engine.connect()
    threads: list[threading.Thread] = []

    def kill_when_recovering() -> None:
        while not watcher.stats().recovering:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(second, signal.SIGKILL)

    def fault() -> None:
        threads.append(threading.Thread(target=kill_when_recovering))
        threads[0].start()
        os.kill(first, signal.SIGKILL)

    _check(engine, undisturbed, _moment(undisturbed, 99), fault)
    threads[0].join()
    watcher.close()
    assert not {first, second} & {*engine.worker_pids()}
