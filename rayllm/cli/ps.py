"""`rayllm ps`: the servers of this user that run on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rayllm.cli.flags import Parser


def parser() -> Parser:
    made = Parser(prog="rayllm ps", description="List your servers on this machine.")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """A line a server, with the state that its own /health tells; 0 also where none runs."""
    given = parser().parse(argv)

    from rayllm.cli.client import ApiClient
    from rayllm.cli.table import span, table
    from rayllm.machine.registry import running

    entries = running()
    states = []
    for entry in entries:
        with ApiClient(entry.url, timeout_s=2.0) as client:
            states.append(client.stage())
    if given.get("json"):
        print(json.dumps([{**entry.shown(), "state": state} for entry, state in zip(entries, states, strict=True)]))
    elif not entries:
        print("you have no running server on this machine; start one with 'rayllm serve'")
    else:
        now = time.time()
        rows = [
            (entry.name, str(entry.pid), entry.model, f"{entry.url}/v1", span(now - entry.since), state)
            for entry, state in zip(entries, states, strict=True)
        ]
        print(table(("name", "pid", "model", "url", "up", "state"), rows))
    return 0
