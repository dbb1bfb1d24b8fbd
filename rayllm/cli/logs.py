"""`rayllm logs`: the end of a server's log file, and what is added to it."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.cli.flags import Parser, UsageError
from rayllm.errors import EngineUnreachableError, RayLLMError

if TYPE_CHECKING:
    from rayllm.machine.registry import Entry

_POLL_S = 0.2


def parser() -> Parser:
    made = Parser(prog="rayllm logs", description="Print a server's log; without a running server, the newest log.")
    made.add_argument(
        "server", metavar="NAME|PID|PORT|URL", nargs="?", help="the server; required if more than one is running"
    )
    made.add_argument(
        "--lines", "-n", type=int, default=100, metavar="N", help="number of last lines (default: 100; 0: all)"
    )
    made.add_argument("--follow", "-f", action="store_true", help="print new lines until the server stops")
    made.add_argument("--json", action="store_true", help="print path and lines as one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints lines as they are; where they come from goes to stderr."""
    given = parser().parse(argv)
    if given["lines"] < 0:
        raise UsageError(f"--lines {given['lines']} must be 0 (all) or more")
    if given.get("json") and given.get("follow"):
        raise UsageError("--json cannot be combined with --follow: leave one of them out")
    path, entry = _log_of(given.get("server"))
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RayLLMError(f"log file {str(path)!r} cannot be read: {error.strerror}") from None
    with file:
        last = deque(file, maxlen=given["lines"] or None)
        if given.get("json"):
            print(json.dumps({"path": str(path), "lines": [line.rstrip("\n") for line in last]}))
            return 0
        print(f"==> {path}", file=sys.stderr, flush=True)
        print("".join(last), end="", flush=True)
        if given.get("follow") and entry is not None:
            for text in _added(file, entry):
                print(text, end="", flush=True)
    return 0


def _log_of(server: str | None) -> tuple[Path, Entry | None]:
    """The log of the server that is meant; without one running and none named, the newest there is."""
    from rayllm.machine.folders import log_folder
    from rayllm.machine.registry import find, running

    if server is not None or running():
        entry = find(server)
        return Path(entry.log), entry
    logs = sorted(log_folder().glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise EngineUnreachableError(f"you have no running server, and {log_folder()} has no log files")
    return logs[-1], None


def _added(file: Iterator[str], entry: Entry) -> Iterator[str]:
    """What is written to the file until the server is gone."""
    while True:
        alive = entry.is_alive()  # asked first: what it wrote before it went is read below
        yield from file
        if not alive:
            return
        time.sleep(_POLL_S)
