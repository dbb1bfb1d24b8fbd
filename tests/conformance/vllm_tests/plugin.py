"""pytest's plugin for vLLM's tests: stand-ins for what they import, reasons for what is not applicable, a table."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

sys.path.append(os.environ["CONFORMANCE_PACKAGES"])  # behind RayLLM's own: only what those lack

from vllm_tests import servers, stubs
from vllm_tests.applicability import difference, reason_against

stubs.install()
_ORDER = ("failed", "xfailed", "passed", "skipped")
_SHOWN = ("passed", "failed", "xfailed", "skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := reason_against(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif what := difference(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=what, strict=True))


def pytest_sessionfinish() -> None:
    servers.stop_all()


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """By file: how many of its functions passed in every case that is applicable, and are applicable in none."""
    outcomes: dict[str, set[str]] = defaultdict(set)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call" or outcome != "passed":
                outcomes[report.nodeid.partition("[")[0]].add("failed" if outcome == "error" else outcome)
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for function, found in outcomes.items():
        by_file[function.partition("::")[0]][next(each for each in _ORDER if each in found)] += 1
    write = terminalreporter.write_line
    write("| File | Functions passed | Failed | Different on purpose | Not applicable |")
    for file, counts in [*sorted(by_file.items()), ("all", sum(by_file.values(), Counter()))]:
        shown = (file.removeprefix("tests/entrypoints/"), *(counts[each] for each in _SHOWN))
        write(f"| {' | '.join(map(str, shown))} |")
    yield
