from __future__ import annotations

import asyncio
import threading

from rayllm.api.offload import MAX_LARGE_AT_ONCE, is_large, large_request, offload, offload_unless


async def test_only_the_work_of_large_requests_leaves_the_event_loops_thread() -> None:
    here = threading.get_ident()
    assert await offload(threading.get_ident) == here
    assert await offload_unless(True, threading.get_ident) == here
    assert await offload_unless(False, threading.get_ident) != here
    with large_request():
        assert await offload(threading.get_ident) != here
        assert await offload_unless(True, threading.get_ident) != here
        assert await offload(is_large)
    assert not is_large()


async def test_large_requests_have_few_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()
    done = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        done.wait(0.02)
        with lock:
            running -= 1

    with large_request():
        await asyncio.gather(*(offload(work) for _ in range(8)))
    assert most <= MAX_LARGE_AT_ONCE
