"""A mixed load on a real engine of two ranks whose processes are killed and stopped meanwhile. Clients must not be able
to tell, but by the clock."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.client.blocking_journaled_client import BlockingJournaledClient
from rayllm.engine.owner.owner import OwnedEngine
from rayllm.engine.owner.resolve import resolve
from rayllm.messages import EngineStats, Finish, TokenLogprobs
from rayllm.parsing.tool_formats import HERMES
from rayllm.parsing.tool_grammar import GrammarWriter, Thinking
from rayllm.parsing.tools import read_tools
from rayllm.request import Request, SamplingParams, StructuredOutputsParams, pack_ids, unpack_ids

SHARED = list(range(40, 80))
BROKEN = 270
"""A token whose embedding is NaN."""


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


def _bound(seed: int, n: int = 1, **text: Any) -> Request:
    """Nothing but this, and to its end."""
    params = StructuredOutputsParams(**text)
    return _request([15, seed], n=n, temperature=1.0, seed=seed, max_tokens=100, structured_outputs=params)


def _call() -> str:
    """The grammar of a chat that must call a tool."""
    tool = {"type": "function", "function": {"name": "pack", "parameters": _SCHEMA}}
    plan = read_tools([tool], "required", parallel=False)
    assert plan is not None
    return GrammarWriter({}).forced(plan, HERMES, None, Thinking.NONE)


_SIZES = {"type": "array", "items": {"enum": ["small", "large", "vast"]}, "minItems": 2, "maxItems": 3}
_SCHEMA = {"type": "object", "properties": {"sizes": _SIZES}, "required": ["sizes"], "additionalProperties": False}
BOUND = [_bound(8, n=2, json=json.dumps(_SCHEMA)), _bound(9, grammar=_call())]
LOAD = [
    _request([5, 6, 7], n=3, temperature=1.0, seed=3),
    _request([9] * 150, logprobs=2),
    _request([8, 9, 10], temperature=0.9, top_p=0.9, seed=4, stop_token_ids=(200, 201, 202, 203), ignore_eos=False),
    _request([11, 12], temperature=0.7, seed=5, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    _request([*SHARED, 1], prompt_logprobs=1, max_tokens=30),
    _request([*SHARED, 2], logprobs=1, max_tokens=90),
    _request([*SHARED, 3], temperature=1.0, top_k=20, seed=6),
    *BOUND,
    _request([13, BROKEN, 14], n=2, temperature=1.0, seed=7),
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


def _with_a_broken_token() -> Any:
    """Makes a rank's runner; a function of a function, so that it travels to the workers by value."""

    def make(config: ResolvedConfig, tp: Any) -> Any:
        import torch

        from rayllm.runner.runner import Runner

        runner = Runner(config, tp)
        embedding = runner._model.decoder._embedding
        if BROKEN in embedding._part:
            embedding.weight_VD[BROKEN - embedding._part.start] = torch.nan
        return runner

    return make


class Engine:
    """A running engine of two ranks, and one client of it that outlives its drivers."""

    def __init__(self, path: Path, standby: str = "off"):
        settings = {"tensor_parallel_size": 2, "device": "cpu", "num_kv_blocks": 200, "max_num_seqs": 16}
        settings |= {"max_model_len": 256, "max_num_batched_tokens": 64, "standby": standby}
        config = EngineConfig(model=str(path), name="chaos", **settings)
        self.owned = OwnedEngine(resolve(config, num_gpus=0, num_cores=2, backend="ray"), _with_a_broken_token())
        self.next_stream = 0
        self._seen: set[int] = set()
        try:
            self.owned.start()
            self.client = BlockingJournaledClient(self.owned.connect(), self.owned.reconnect)
        except BaseException:
            self.owned.close()
            raise

    def pids(self) -> tuple[int, list[int]]:
        """The driver's process, and the ranks'."""
        import ray

        description = ray.get(self.owned.driver.describe.remote())
        ranks = [place.pid for place in description.workers]
        self._seen |= {description.driver.pid, *ranks}
        return description.driver.pid, ranks

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
        assert moment is None, "the fault never came"
        return list(answers.values())

    def check(self, undisturbed: list[Answer], moment: int, fault: Callable[[], None]) -> EngineStats:
        """Runs the load with a fault. Raises `AssertionError` where a client could tell, or where anything of the load
        is left behind."""
        answers = self.run(moment, fault)
        for number, (answer, expected) in enumerate(zip(answers, undisturbed, strict=True)):
            assert answer.exact() == expected.exact(), f"choice {number} is another than without a fault"
        stats = self.client.stats()
        while stats.recovering:  # a fault may have come when all was said
            time.sleep(0.05)
            stats = self.client.stats()
        assert stats.healthy, stats.reason
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        return stats

    def when_recovering(self, action: Callable[[], None], delay_s: float) -> threading.Thread:
        """Does it once so much time has passed since the driver began to replace a rank."""
        watcher = self.owned.connect()

        def watch() -> None:
            with contextlib.closing(watcher):
                while not watcher.stats().recovering:
                    time.sleep(0.01)
                time.sleep(delay_s)
                action()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def close(self) -> None:
        """Ends it; `AssertionError` where a process that was seen is left behind."""
        with contextlib.suppress(Exception):
            self.pids()
        self.client.close()
        self.owned.close()
        deadline = time.monotonic() + 10
        while left := [pid for pid in self._seen if os.path.exists(f"/proc/{pid}")]:
            assert time.monotonic() < deadline, f"processes {left} were left behind"
            time.sleep(0.05)


def moment_of(undisturbed: list[Answer], rng: random.Random) -> int:
    """A number of tokens, in the first two thirds of the run."""
    total = sum(len(answer.tokens) for answer in undisturbed)
    return rng.randrange(1, total * 2 // 3)


def kill(pid: int, sign: signal.Signals = signal.SIGKILL) -> None:
    """The process may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sign)


def stop_for_a_while(pid: int, seconds: float) -> threading.Timer:
    """Stopped, and continued later: what it says then may be of no use any more."""
    kill(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, kill, [pid, signal.SIGCONT])
    timer.start()
    return timer
