"""Overload in fake time: an engine whose steps cost what their plans say, and arrivals that wait for nobody."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from fakes import FakeExecutor, fake_config, make_request

from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.local import build_scheduler
from rayllm.messages import Deltas, DriverMessage, StepResult, Submit
from rayllm.request import unpack_ids

_TIMEOUT_S = 4.0
_START_S = 1000.0
CAPACITY = 37.7
"""Requests a second that the engine below can do: 1 / 0.0265 s, measured with a queue that never empties."""


class _TimedExecutor(FakeExecutor):
    """Each step moves the clock, by `step_s` or by what its plan costs."""

    step_s: float | None = None

    def __init__(self) -> None:
        super().__init__(num_blocks=512, max_inflight_steps=1)
        self.now = _START_S

    def receive(self, timeout_s: float | None) -> StepResult:
        num_tokens = sum(unpack_ids(self.sent[-1].counts))
        step_s = self.step_s or 0.005 + 0.0002 * num_tokens
        self.now += step_s
        self.sent.clear()
        return msgspec.structs.replace(super().receive(timeout_s), elapsed_s=step_s)


@dataclass
class _Run:
    """Arrivals of `requests_per_s` for 40 seconds, and what became of them after the first 10."""

    requests_per_s: float
    seconds: float = 40.0
    client_weights: dict[str, int] = field(default_factory=lambda: {"a": 1})
    timeout_s: float | None = _TIMEOUT_S
    good_tokens: dict[str, int] = field(default_factory=dict)
    num_refused: int = 0
    num_expired: int = 0
    max_waiting: int = 0
    hints_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor = _TimedExecutor()
        config = fake_config(engine={"enable_prefix_caching": False, "max_queued_requests": 200})
        clock = self._clock
        scheduler = build_scheduler(config, self.executor.num_blocks)
        self.loop = EngineLoop(config, scheduler, self.executor, self._take, wall_clock=clock, clock=clock)
        self.sent: list[tuple[str, int]] = []
        self._run(random.Random(1))

    def _clock(self) -> float:
        return self.executor.now

    def _take(self, client: object, message: DriverMessage) -> None:
        assert isinstance(message, Deltas)
        for delta in message.deltas:
            if delta.finish is None or self.executor.now < _START_S + 10:
                continue
            key, num_tokens = self.sent[delta.stream]
            if delta.finish.code == "overloaded":
                self.num_refused += 1
                self.hints_s.append(delta.finish.retry_after_s or 0.0)
            elif delta.finish.code == "deadline_exceeded":
                self.num_expired += 1
            else:
                self.good_tokens[key] = self.good_tokens.get(key, 0) + num_tokens

    def _run(self, rng: random.Random) -> None:
        due_s = _START_S
        while self.executor.now < _START_S + self.seconds:
            while due_s <= self.executor.now:
                self._submit(rng, due_s)
                due_s += rng.expovariate(self.requests_per_s)
            self.max_waiting = max(self.max_waiting, self.loop.stats().num_waiting)
            if not self.loop.step():
                self.executor.now = max(self.executor.now, due_s)

    def _submit(self, rng: random.Random, due_s: float) -> None:
        [key] = rng.choices(list(self.client_weights), list(self.client_weights.values()))
        num_tokens = rng.randint(8, 40)
        request = make_request([rng.randrange(900) for _ in range(rng.randint(8, 60))], max_tokens=num_tokens)
        deadline_s = None if self.timeout_s is None else due_s + self.timeout_s
        request = msgspec.structs.replace(request, deadline_s=deadline_s, client_key=key)
        stream = len(self.sent)
        self.sent.append((key, num_tokens))
        self.loop.submit("client", Submit(stream, request))

    @property
    def goodput(self) -> float:
        return sum(self.good_tokens.values()) / (self.seconds - 10)


@pytest.fixture(scope="module")
def full_load() -> _Run:
    """As much as comes is done: about what the engine can do."""
    return _Run(CAPACITY)


def test_at_full_load_nothing_is_refused(full_load: _Run) -> None:
    assert (full_load.num_refused, full_load.num_expired) == (0, 0)


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_goodput_under_overload_is_that_of_full_load(full_load: _Run, factor: float) -> None:
    run = _Run(factor * CAPACITY)
    assert run.goodput >= 0.95 * full_load.goodput
    assert run.num_expired <= 0.01 * run.num_refused, "what cannot make its deadline is refused, not begun"
    assert 0 < min(run.hints_s) <= max(run.hints_s) < _TIMEOUT_S


def test_without_deadlines_the_bound_of_the_queue_keeps_goodput(full_load: _Run) -> None:
    run = _Run(4 * CAPACITY, timeout_s=None)
    assert run.goodput >= 0.95 * full_load.goodput
    assert run.max_waiting <= 200 + 8


def test_a_client_that_asks_for_its_share_gets_it_beside_one_that_asks_for_seven_times_as_much(
    full_load: _Run,
) -> None:
    run = _Run(4 * CAPACITY, client_weights={"greedy": 8, "modest": 1})
    wanted = 4 / 9 * full_load.goodput
    assert run.good_tokens["modest"] / (run.seconds - 10) >= 0.95 * wanted
    assert run.goodput >= 0.9 * full_load.goodput, "the greedy one is told how slowly its own line moves"


class _Burst:
    """A fresh engine of 4 rows whose queue fills at once; a probe is refused every half second until all have begun."""

    def __init__(self, step_s: float | None, num_requests: int, max_tokens: int, prompt_tokens: int = 4):
        self.executor = _TimedExecutor()
        self.executor.step_s = step_s
        engine = {"enable_prefix_caching": False, "max_queued_requests": num_requests - 4}
        config = fake_config(engine=engine, max_num_seqs=4)
        clock = lambda: self.executor.now  # noqa: E731
        self.scheduler = build_scheduler(config, self.executor.num_blocks)
        self.loop = EngineLoop(config, self.scheduler, self.executor, self._take, wall_clock=clock, clock=clock)
        self.hints_s: list[tuple[float, float]] = []
        prompt = list(range(1, 1 + prompt_tokens))
        for stream in range(num_requests):
            self.loop.submit("load", Submit(stream, make_request(prompt, max_tokens=max_tokens, ignore_eos=True)))
        num_probes, due_s = 0, _START_S
        while len(self.scheduler.waiting):
            while due_s <= self.executor.now and len(self.hints_s) == num_probes:  # until one is let in
                stream = num_requests + num_probes
                self.loop.submit("probe", Submit(stream, make_request(prompt, max_tokens=max_tokens)))
                num_probes, due_s = num_probes + 1, due_s + 0.5
            self.loop.step()
        self.drained_s = self.executor.now

    def _take(self, client: object, message: DriverMessage) -> None:
        assert isinstance(message, Deltas)
        if client == "probe":
            finish = message.deltas[0].finish
            if finish is not None and finish.code == "overloaded":
                assert finish.retry_after_s is not None
                self.hints_s.append((self.executor.now, finish.retry_after_s))


@pytest.mark.parametrize(
    ("num_requests", "max_tokens", "prompt_tokens"), [(44, 64, 4), (24, 100, 4), (200, 8, 4), (60, 20, 100)]
)
def test_a_refusal_says_how_long_the_queue_takes_also_before_anything_was_measured(
    num_requests: int, max_tokens: int, prompt_tokens: int
) -> None:
    burst = _Burst(None, num_requests, max_tokens, prompt_tokens)
    assert burst.hints_s
    for at_s, hint_s in burst.hints_s:
        left_s = burst.drained_s - at_s
        measured = at_s - _START_S > 2.0
        lower, upper = (0.5, 2.0) if measured else (0.4, 10.0)  # what a step is taken to last is 2 to 10 times too long
        assert lower * left_s - 1.0 <= hint_s <= upper * left_s + 1.5, (at_s - _START_S, hint_s, left_s)


def test_slow_steps_are_told_from_the_first_one_on() -> None:
    burst = _Burst(0.5, 24, 40)
    for at_s, hint_s in burst.hints_s:
        left_s = burst.drained_s - at_s
        if at_s > _START_S:
            assert 0.5 * left_s - 1.0 <= hint_s <= 2.0 * left_s + 1.5, (at_s - _START_S, hint_s, left_s)


def test_the_hint_grows_with_the_queue() -> None:
    hints_s = [_Burst(None, num_requests, 30).hints_s[0][1] for num_requests in (10, 20, 40, 80)]
    assert hints_s == sorted(hints_s)
    assert hints_s[-1] > 4 * hints_s[0]
