from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rayllm.errors import EngineError
from rayllm.executor.ray_watch import RayProcess, RayWatch
from rayllm.machine.processes import Process, process_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def _watch(child: subprocess.Popen[bytes], *, ends_stopped: bool = False) -> RayWatch:
    process = process_of(child.pid)
    assert process is not None
    return RayWatch([RayProcess("raylet", process)], ends_stopped=ends_stopped)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda child: child.kill(), "was killed by SIGKILL"),
        (lambda child: child.send_signal(signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda child: child.terminate(), "was killed by SIGTERM"),
        (lambda child: (child.kill(), child.wait()), "was killed by SIGKILL"),
    ],
)
def test_a_death_is_told_with_who_died_and_how(
    end: Callable[[subprocess.Popen[bytes]], None], said: str, child: subprocess.Popen[bytes]
) -> None:
    watch = _watch(child)
    heard: list[EngineError] = []
    watch.on_lost(heard.append)
    unheard: list[EngineError] = []
    watch.on_lost(unheard.append)()  # taken away at once
    watch.raise_if_lost()
    assert watch.error is None

    end(child)
    assert watch.wait_lost(5)
    with pytest.raises(
        EngineError, match=rf"^Ray's raylet \(pid {child.pid}\) (has died|{said}): the engine"
    ) as raised:
        watch.raise_if_lost()
    assert raised.value.code == "ray_died"
    watch.on_lost(heard.append)  # too late, and heard at once
    watch.close()
    assert (len(heard), unheard) == (2, [])


def test_a_process_that_is_stopped_for_long_is_ended_by_the_program_that_started_it(
    child: subprocess.Popen[bytes],
) -> None:
    watch = _watch(child, ends_stopped=True)
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    child.send_signal(signal.SIGCONT)  # as a shell's fg does
    assert not watch.wait_lost(1)

    child.send_signal(signal.SIGSTOP)
    assert watch.wait_lost(10)
    assert "was stopped by a signal and has been killed" in str(watch.error)
    assert child.wait(5) == -signal.SIGKILL


def test_nobody_else_ends_a_process_that_is_stopped(child: subprocess.Popen[bytes]) -> None:
    watch = _watch(child)
    child.send_signal(signal.SIGSTOP)
    assert not watch.wait_lost(3)
    watch.close()


def test_without_pidfd_a_death_is_seen_all_the_same(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    watch = _watch(child)
    child.kill()
    assert watch.wait_lost(5)


def test_where_nothing_can_be_known_nothing_is_lost() -> None:
    for watch in (RayWatch([]), RayWatch([RayProcess("raylet", Process(os.getpid(), 0))])):
        assert not watch.wait_lost(0.6)
        assert watch.call(lambda: 5) == 5
        watch.close()
        watch.close()


def test_a_process_that_was_dead_before_is_lost_at_once() -> None:
    assert RayWatch([RayProcess("raylet", Process(os.getpid(), 1))]).wait_lost(5)


def test_a_call_returns_and_raises_what_the_function_does(child: subprocess.Popen[bytes]) -> None:
    watch = _watch(child)
    assert watch.call(lambda: 5, 1) == 5
    with pytest.raises(ZeroDivisionError):
        watch.call(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"Ray did not answer within 0\.05 s"):
        watch.call(lambda: time.sleep(1), 0.05)
    watch.close()


def test_a_call_under_way_ends_with_ray(child: subprocess.Popen[bytes]) -> None:
    watch = _watch(child)
    threading.Timer(0.1, child.kill).start()
    for _ in range(2):  # under way, and afterwards
        with pytest.raises(EngineError, match="raylet"):
            watch.call(threading.Event().wait)


async def test_work_under_way_ends_with_ray(child: subprocess.Popen[bytes]) -> None:
    watch = _watch(child)
    cancelled = False

    async def work(seconds: float) -> str:
        nonlocal cancelled
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled = True
            raise
        return "done"

    assert await watch.until_lost(work(0)) == "done"
    asyncio.get_running_loop().call_later(0.1, child.kill)
    with pytest.raises(EngineError, match="raylet"):
        await watch.until_lost(work(600))
    assert cancelled


async def test_work_that_is_given_up_is_cancelled(child: subprocess.Popen[bytes]) -> None:
    watch = _watch(child)
    task = asyncio.create_task(watch.until_lost(asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    watch.close()
