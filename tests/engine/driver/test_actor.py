from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import msgspec
import pytest
from fakes import FakeExecutor, expected_tokens, fake_config, make_request

from rayllm.config import ResolvedConfig
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.client.named_connection import connect_by_name
from rayllm.engine.discovery import find_address, find_driver, known_engines
from rayllm.engine.driver.actor import Driver
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.driver.step_times import FIRST_STEPS_S
from rayllm.engine.owner.driver_handle import create_driver
from rayllm.engine.owner.local import build_scheduler
from rayllm.errors import ConfigError, EngineError, EngineUnreachableError, WorkerDiedError
from rayllm.executor.executor import Selectable
from rayllm.messages import Finish, Submit, TokenDelta
from rayllm.request import unpack_ids


class _Executor(FakeExecutor):
    """A `FakeExecutor` with a socket, that can lose rank 1 while idle, and can hold results back."""

    def __init__(self, **changes: Any):
        super().__init__(**changes)
        self._wake_in, self._wake_out = socket.socketpair()
        self._lost = False
        self._gate = threading.Event()
        self._gate.set()
        self.num_checks = 0

    def hold_results(self) -> None:
        self._gate.clear()

    def release_results(self) -> None:
        self._gate.set()
        self._wake_in.send(b"\0")

    def receive(self, timeout_s: float | None) -> Any:
        if timeout_s == 0.0 and not self._gate.is_set():
            raise TimeoutError
        self._gate.wait(5.0)
        return super().receive(timeout_s)

    def check(self) -> None:
        self.num_checks += 1
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(64, socket.MSG_DONTWAIT)
        if self._lost:
            self._lost = False
            raise WorkerDiedError(1, "killed by the test")

    def result_socket(self) -> Selectable | None:
        return self._wake_out

    def lose(self) -> None:
        self._lost = True
        self._wake_in.send(b"\0")

    def close(self) -> None:
        super().close()
        self._wake_in.close()
        self._wake_out.close()


class _Engine:
    """A driver of a fake executor, and one client of it."""

    def __init__(self, executor: _Executor):
        self.executor = executor
        self.driver = Driver(lambda config, on_stage: executor)
        self.failures: list[str] = []
        self.driver.start(fake_config(), on_failed=self.failures.append)
        self.client = BlockingDriverConnection(self.driver.address())

    def close(self) -> None:
        self.client.close()
        self.driver.close()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., _Engine]]:
    engines: list[_Engine] = []

    def make(**changes: Any) -> _Engine:
        engines.append(_Engine(_Executor(**changes)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def _finish(client: BlockingDriverConnection, stream: int) -> tuple[list[int], Finish]:
    """The tokens of one stream to its end; other streams' deltas are dropped."""
    tokens: list[int] = []
    while True:
        for delta in client.receive():
            if delta.stream == stream:
                tokens += unpack_ids(delta.token_ids)
                if delta.finish is not None:
                    return tokens, delta.finish


def _receive_forever(client: BlockingDriverConnection) -> None:
    while True:
        client.receive()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_requests_of_several_clients_are_served_over_their_sockets(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    assert engine.driver.stage == "ready"
    other = BlockingDriverConnection(engine.driver.address())
    mine, theirs = make_request([1, 2, 3], max_tokens=9), make_request([4], max_tokens=5, seed=3)
    engine.client.submit(0, mine)
    other.submit(0, theirs)
    assert _finish(engine.client, 0) == (expected_tokens(mine), Finish("length"))
    assert _finish(other, 0) == (expected_tokens(theirs), Finish("length"))
    other.close()


def test_a_client_that_goes_takes_its_requests_with_it(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    leaver = BlockingDriverConnection(engine.driver.address())
    for stream in range(3):
        leaver.submit(stream, make_request([1], max_tokens=120))
    engine.executor.hold_results()  # mid-step while the client leaves
    leaver.close()
    engine.executor.release_results()
    _until(lambda: engine.client.stats().num_running + engine.client.stats().num_waiting == 0)
    assert engine.client.stats().num_blocks_used == 0


def test_a_step_that_lasts_keeps_nobody_waiting(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    request, aborted = make_request([1, 2], max_tokens=5), make_request([3], max_tokens=120)
    engine.executor.hold_results()
    engine.client.submit(0, request)
    engine.client.submit(1, aborted)
    _until(lambda: engine.client.stats().num_running > 0)  # figures
    engine.client.submit(2, make_request([10**9], max_tokens=5))
    _, refused = _finish(engine.client, 2)
    assert refused.reason == "error"
    engine.client.abort(1)
    _until(lambda: engine.client.stats().num_waiting + engine.client.stats().num_running == 1)
    assert engine.client.stats().num_steps == 0
    engine.executor.release_results()
    assert _finish(engine.client, 0) == (expected_tokens(request), Finish("length"))


@pytest.mark.parametrize(("stopped", "limit_s"), [([], FIRST_STEPS_S), ([1], 1.6)])
def test_a_step_that_does_not_end_is_noticed_in_its_time(stopped: list[int], limit_s: float) -> None:
    """Messages that come during it give it no more time; a rank that is stopped takes it away."""
    now = [100.0]
    config, executor = fake_config(), FakeExecutor(num_blocks=64)
    loop = EngineLoop(config, build_scheduler(config, 64), executor, lambda client, message: None, clock=lambda: now[0])

    def poll(timeout_s: float) -> None:
        now[0] += min(timeout_s, 0.4)

    def receive(timeout_s: float | None) -> Any:
        raise TimeoutError

    executor.receive = receive  # type: ignore[method-assign]
    executor.stopped_ranks = lambda: stopped  # type: ignore[method-assign]
    loop.submit("me", Submit(0, make_request([1], max_tokens=2)))
    loop.step(poll)  # fills the pipeline
    loop.step(poll)
    assert now[0] - 100.0 == pytest.approx(limit_s)


def test_without_work_the_loop_sleeps(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    engine.client.submit(0, make_request([1], max_tokens=2))
    _finish(engine.client, 0)
    engine.client.stats()
    time.sleep(0.1)
    num_checks = engine.executor.num_checks
    time.sleep(0.3)
    assert engine.executor.num_checks == num_checks


def test_a_worker_lost_in_a_step_costs_no_request(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine(dies=[3])
    request = make_request([1], max_tokens=20)
    engine.client.submit(0, request)
    assert _finish(engine.client, 0) == (expected_tokens(request), Finish("length"))
    assert (engine.executor.recovered, engine.failures) == ([[1]], [])
    assert engine.client.stats().num_faults == 1


def test_a_deadline_is_kept_while_a_step_lasts() -> None:
    now, told_at = [100.0], []
    config, executor = fake_config(), FakeExecutor(num_blocks=64)
    scheduler, clock = build_scheduler(config, 64), lambda: now[0]
    loop = EngineLoop(config, scheduler, executor, lambda *message: told_at.append(now[0]), clock, clock=clock)

    def poll(timeout_s: float) -> None:
        now[0] += timeout_s

    def receive(timeout_s: float | None) -> Any:
        raise TimeoutError

    executor.receive = receive  # type: ignore[method-assign]
    loop.submit("me", Submit(0, msgspec.structs.replace(make_request([1], max_tokens=20), deadline_s=100.2)))
    loop.step(poll)  # fills the pipeline
    loop.step(poll)
    assert told_at == [100.5]
    assert now[0] == 100.0 + FIRST_STEPS_S


def test_a_deadline_is_kept_while_a_worker_is_replaced(make_engine: Callable[..., _Engine]) -> None:
    engine, replaced = make_engine(), threading.Event()
    recover = engine.executor.recover
    engine.executor.recover = lambda lost: replaced.wait(10.0) and recover(lost)  # type: ignore
    engine.executor.lose()
    _until(lambda: engine.client.stats().recovering)
    request = msgspec.structs.replace(make_request([1], max_tokens=20), deadline_s=time.time() + 0.2)
    engine.client.submit(0, request)
    assert _finish(engine.client, 0)[1].code == "deadline_exceeded"
    assert engine.client.stats().recovering
    replaced.set()
    _until(lambda: not engine.client.stats().recovering)


def test_a_worker_lost_without_work_is_replaced_at_once(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    engine.executor.lose()
    _until(lambda: engine.executor.recovered == [[1]])
    request = make_request([1], max_tokens=20)
    engine.client.submit(0, request)
    assert _finish(engine.client, 0) == (expected_tokens(request), Finish("length"))


def test_a_worker_lost_for_good_in_a_step_ends_every_request_with_the_reason(
    make_engine: Callable[..., _Engine],
) -> None:
    engine = make_engine(dies=[3], recovers=False)
    for stream in range(2):
        engine.client.submit(stream, make_request([1], max_tokens=50, seed=stream))
    ends: dict[int, Finish] = {}
    while len(ends) < 2:
        ends |= {delta.stream: delta.finish for delta in engine.client.receive() if delta.finish is not None}
    expected = Finish("error", None, "worker_died", "worker rank 1 failed: killed by the test")
    assert ends == {0: expected, 1: expected}
    _assert_failed(engine, "worker rank 1 failed: killed by the test")


def test_a_worker_lost_for_good_without_work_is_noticed_at_once(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine(recovers=False)
    engine.executor.lose()
    _until(lambda: bool(engine.failures))
    _assert_failed(engine, "worker rank 1 failed: killed by the test")


def _assert_failed(engine: _Engine, reason: str) -> None:
    """Unhealthy, told once, still answering, and asleep."""
    stats = engine.client.stats()
    assert (stats.healthy, stats.reason) == (False, reason)
    assert engine.failures == [reason]
    assert engine.driver.stage == f"failed: {reason}"
    engine.client.submit(7, make_request([1]))
    [refusal] = engine.client.receive()
    assert refusal == TokenDelta(7, 0, b"", Finish("error", None, "worker_died", reason))
    assert engine.client.stats().reason == reason


def test_an_executor_that_cannot_start_is_the_callers_error() -> None:
    def fail(config: ResolvedConfig, on_stage: Callable[[str], None]) -> Any:
        on_stage("loading weights")
        raise ConfigError("no weights in this folder")

    driver = Driver(fail)
    with pytest.raises(ConfigError, match="no weights"):
        driver.start(fake_config())
    assert driver.stage == "failed: no weights in this folder"
    with pytest.raises(EngineError, match="not ready: failed: no weights"):
        driver.address()
    driver.close()


def test_a_driver_that_follows_one_that_failed_says_why_until_it_is_ready() -> None:
    stages: list[str] = []

    def make_executor(config: ResolvedConfig, on_stage: Callable[[str], None]) -> Any:
        on_stage("loading weights")
        stages.append(driver.stage)
        if len(stages) > 1:
            raise ConfigError("no weights in this folder")
        return FakeExecutor()

    driver = Driver(make_executor)
    driver.start(fake_config(), 1, "worker rank 1 failed: its device forgets")
    assert driver.stage == "ready"
    driver.close()
    driver = Driver(make_executor)
    with pytest.raises(ConfigError):
        driver.start(fake_config(), 2, "worker rank 1 failed: its device forgets")
    because = " (the previous driver failed: worker rank 1 failed: its device forgets)"
    assert stages == [f"loading weights{because}"] * 2
    assert driver.stage == f"failed: no weights in this folder{because}"
    driver.close()


def test_closing_ends_threads_sockets_and_workers(make_engine: Callable[..., _Engine]) -> None:
    engine = make_engine()
    folder = Path(engine.driver.address().unix_path).parent
    engine.client.submit(0, make_request([1], max_tokens=100))
    engine.driver.close()
    engine.driver.close()
    assert engine.executor.closed
    assert not folder.exists()
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"engine-loop", "client-io"}
    with pytest.raises(EngineError, match="the engine's driver"):
        _receive_forever(engine.client)


# ---------------------------------------------------------------------------------------------- with Ray


def _runner_factory() -> Any:
    """Runners that compute the fake tokens; made here so that they travel by value."""
    import ray

    ray.cloudpickle.register_pickle_by_value(fakes)

    class Runner(fakes.OneStepAtATime):
        def __init__(self, config: ResolvedConfig, tp: Any):
            pass

        def num_blocks_available(self) -> int:
            return 64

        def start(self, num_blocks: int) -> None:
            self.fake = FakeExecutor()

        def warm_up(self) -> None:
            pass

        def execute(self, plan: Any) -> Any:
            self.fake.send(plan)
            return self.fake.receive(None)

    return Runner


def _config(name: str) -> ResolvedConfig:
    return fake_config(engine={"tensor_parallel_size": 2, "name": name}, backend="ray", num_threads=1)


@pytest.mark.cluster
async def test_an_engine_of_actors_is_found_by_name_serves_outlives_a_worker_and_leaves_nothing(
    ray_cluster: None,
) -> None:
    import ray

    config = _config("driver-test")
    running = create_driver(config, _runner_factory())
    driver = running.driver
    pids: list[int] = []
    try:
        with pytest.raises(EngineUnreachableError, match=r"engine 'driver-test' cannot be used.*not ready"):
            await find_address("driver-test")
        with pytest.raises(ConfigError, match="'driver-test' is already running"):
            create_driver(config)
        assert await driver.stage.remote() == "starting the driver"
        stages: list[str] = []
        await asyncio.to_thread(running.start, config, stages.append)
        assert "loading weights" in stages
        assert await driver.stage.remote() == "ready"

        description = await driver.describe.remote()
        pids = [place.pid for place in (description.driver, *description.workers)]
        assert len(set(pids)) == 3
        assert (description.num_blocks, description.served_model_name) == (64, "fake")
        assert ResolvedConfig.model_validate_json(description.config) == config

        with pytest.raises(EngineUnreachableError, match=r"no engine named 'driver-tset'.*'driver-test'"):
            await connect_by_name("driver-tset")
        request = make_request([1, 2], max_tokens=20, n=2)
        async with await connect_by_name("driver-test") as connection:
            tokens: dict[int, list[int]] = {0: [], 1: []}
            async for deltas in connection.submit(request):
                for delta in deltas:
                    tokens[delta.choice] += unpack_ids(delta.token_ids)
            assert tokens == {choice: expected_tokens(request, choice) for choice in (0, 1)}

            own = await driver.address.remote(ray.get_runtime_context().get_node_id())
            assert own.host is None
            far = await driver.address.remote("some other node")
            assert far.host is not None

            os.kill(description.workers[1].pid, signal.SIGKILL)
            tokens = {0: [], 1: []}
            async for deltas in connection.submit(request):
                for delta in deltas:
                    tokens[delta.choice] += unpack_ids(delta.token_ids)
            assert tokens == {choice: expected_tokens(request, choice) for choice in (0, 1)}
            while (stats := await connection.stats()).recovering or not stats.num_faults:  # these ranks need no peer
                await asyncio.sleep(0.05)
            workers = (await driver.describe.remote()).workers
            assert workers[0] == description.workers[0]
            assert workers[1].pid not in pids
            pids += [place.pid for place in workers]
    finally:
        running.close()
    assert "driver-test" not in known_engines()
    with pytest.raises(EngineUnreachableError, match="no engine named 'driver-test'"):
        find_driver("driver-test")
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.cluster
async def test_a_model_that_cannot_be_loaded_is_the_callers_error(ray_cluster: None) -> None:
    class Runner:
        def __init__(self, config: ResolvedConfig, tp: Any):
            raise ConfigError("no weights in this folder")

    running = create_driver(_config("broken"), Runner)  # type: ignore[arg-type]
    try:
        with pytest.raises(ConfigError, match=r"^no weights in this folder$"):
            await asyncio.to_thread(running.start, _config("broken"))
        assert await running.driver.stage.remote() == "failed: no weights in this folder"
    finally:
        running.close()
