"""Cases of the catalogue that no test here runs, and why. `test_catalogue` holds the table to the catalogue."""

from __future__ import annotations

_ADAPTERS = "LoRA adapters do not exist yet"

WAITING: dict[str, str] = {
    "F131": _ADAPTERS,
    "F132": _ADAPTERS,
    "F133": _ADAPTERS,
    "F122": "nothing is cached on disk, so a full one has nothing to break; returns with the first such cache",
    "A061": "a statistic of times, no test for a shared machine; keys are compared as digests, in constant time",
    "F103": "decided otherwise: published models have such tokens; a prompt with one is refused, tested beside it",
    "Q003": "a soak of 30 s and a ratio of times; tests/test_server.py stalls a reader through the proxy",
    "Q015": "a round of all the others: `pytest -m slow tests/badinput` starts a second server, with PYTHONOPTIMIZE=1",
    "Q016": "in process, where memory can be filled: what memory held before, in tests/test_schedule_invariance.py",
}

NOT_BEHIND: dict[str, dict[str, str]] = {
    "haproxy": {
        "H034": "it takes a bare LF for a line's end, as RFC 9112 allows, and passes a clean request on; no setting",
        "H035": "it joins folded lines, as RFC 9112 allows, and passes a clean request on; no setting",
    },
    "python": {
        "H023": "Serve's Python proxy waits for the end of headers for ever: it has no setting for it",
        "H042": "Serve's Python proxy holds all of a body",
        "H059": "Serve's Python proxy sends back an X-Request-Id of any length",
    },
}
"""Cases that what stands before the ingress decides, otherwise than the catalogue; no ingress can do anything then."""
