from __future__ import annotations

import socket
import threading

from fakes import FakeExecutor

from rayllm.executor.executor import Executor, wait_readable
from rayllm.executor.group import WorkerGroup
from rayllm.executor.inproc import InprocExecutor

_METHODS = {name for name in vars(Executor) if not name.startswith("_")}


def test_wait_readable_returns_the_sources_that_have_something_or_ended() -> None:
    (a, other_a), (b, other_b), (c, other_c) = (socket.socketpair() for _ in range(3))
    with a, other_a, b, other_b, c, other_c:
        other_b.send(b"x")
        assert wait_readable(a, b, c) == [b]
        b.recv(1)
        threading.Timer(0.05, other_c.close).start()
        assert wait_readable(a, b, c) == [c]


def test_every_executor_has_what_the_loop_calls() -> None:
    attributes = {"ranks", "num_blocks", "max_inflight_steps"}  # set by constructors
    for kind in (WorkerGroup, InprocExecutor):
        missing = {name for name in _METHODS - attributes if not hasattr(kind, name)}
        assert not missing, (kind, missing)
    missing = {name for name in _METHODS - {"result_socket"} if not hasattr(FakeExecutor(), name)}
    assert not missing
