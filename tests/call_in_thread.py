"""A blocking call of a test, beside what the test itself does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def call_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Begins the call in a daemon thread: one that never returns does not keep the process."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
