"""`rayllm stop`: stops servers of this machine gracefully: no new requests, time for the open ones, nothing left."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayllm.cli.flags import Parser, UsageError
from rayllm.errors import RayLLMError

if TYPE_CHECKING:
    from rayllm.machine.registry import Entry

_AFTER_DRAIN_S = 30.0
"""What Serve, Ray and the workers may take to end, once open requests have had their time."""
_POLL_S = 0.05


class NotStoppedError(RayLLMError):
    """A server did not end in time."""


def parser() -> Parser:
    made = Parser(
        prog="rayllm stop",
        description="Stop a server on this machine: it refuses new requests and finishes the open ones.",
    )
    made.add_argument(
        "server", metavar="NAME|PID|PORT|URL", nargs="?", help="the server; required if more than one is running"
    )
    made.add_argument("--all", action="store_true", help="all your servers on this machine")
    made.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help=f"seconds to wait (default: the server's --shutdown-timeout and {_AFTER_DRAIN_S:g})",
    )
    made.add_argument("--force", action="store_true", help="end open requests at once")
    return made


def run(argv: Sequence[str]) -> int:
    """0 when all that were meant are gone."""
    given = parser().parse(argv)
    if given.get("all") and "server" in given:
        raise UsageError("give a server or --all, not both")

    from rayllm.machine.registry import find, running

    entries = running() if given.get("all") else [find(given.get("server"))]
    if not entries:
        print("you have no running server on this machine")
    for entry in entries:
        _ask_to_end(entry, force=bool(given.get("force")))
    for entry in entries:
        began = time.monotonic()
        _wait_gone(entry, given.get("timeout", entry.shutdown_timeout_s + _AFTER_DRAIN_S))
        print(f"stopped {entry.name} (pid {entry.pid}, {entry.model}) after {time.monotonic() - began:.1f} s")
    return 0


def _ask_to_end(entry: Entry, *, force: bool) -> None:
    """SIGTERM; a second one ends a server on the spot."""
    entry.process.send(signal.SIGTERM)
    if force:
        time.sleep(0.2)  # two at once would count as one
        entry.process.send(signal.SIGTERM)


def _wait_gone(entry: Entry, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while entry.is_alive():
        if time.monotonic() > deadline:
            raise NotStoppedError(
                f"{entry.name} (pid {entry.pid}) still runs after {timeout_s:g} s, finishing open requests: "
                "wait with --timeout, or end it at once with --force"
            )
        time.sleep(_POLL_S)
