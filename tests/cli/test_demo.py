"""`rayllm demo`, and what it shows of a killed worker."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayllm.cli.answer import Piece, Timing
from rayllm.cli.demo_kill import KilledStream, KillFailedError, chosen_rank, killed_lines, stream_and_kill
from rayllm.cli.flags import UsageError
from rayllm.cli.terminal import Screen


class FakeClient:
    """Streams so many tokens; a kill is noted, or fails."""

    def __init__(self, num_tokens: int, failure: Exception | None = None):
        self._num_tokens = num_tokens
        self._failure = failure
        self.killed: list[Any] = []

    def stream_chat(self, messages: Any, params: Any, timing: Timing) -> Iterator[Piece]:
        for number in range(self._num_tokens):
            timing.note(1)
            yield Piece(f"w{number} ")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        self.killed.append((path, body))
        return {"rank": body["rank"], "pid": 4711}


def stream(client: FakeClient) -> tuple[KilledStream, str]:
    screen = Screen(Path("log"))
    screen.out = io.StringIO()
    seen = stream_and_kill(screen, client, [], {}, Timing(), 1, quiet=False)  # type: ignore[arg-type]
    return seen, screen.out.getvalue()


def test_the_worker_is_killed_while_the_answer_streams() -> None:
    client = FakeClient(40)
    seen, shown = stream(client)
    assert client.killed == [("/admin/kill_worker", {"rank": 1})]
    assert seen.num_tokens_before == 24
    assert "[kill -9 4711: worker rank 1]" in shown
    assert shown.replace(" [kill -9 4711: worker rank 1] ", "") == seen.text
    assert "\x1b" not in shown  # no terminal


@pytest.mark.parametrize(
    ("client", "said"), [(FakeClient(5), "ended after 5 tokens"), (FakeClient(40, ValueError("no")), "killed: no")]
)
def test_a_demonstration_that_shows_nothing_fails(client: FakeClient, said: str) -> None:
    with pytest.raises(KillFailedError, match=said):
        stream(client)


def test_the_silence_is_the_one_round_the_kill() -> None:
    seen = KilledStream(["a"] * 5, [2.0, 2.1, 2.2, 3.0, 3.1], {"rank": 0, "pid": 1}, killed_s=2.25)
    assert seen.silence() == (pytest.approx(0.8), 3.0)


def test_the_rank_is_the_one_that_was_named_or_any() -> None:
    assert chosen_rank("1", 2) == 1
    assert {chosen_rank("", 2) for _ in range(60)} == {0, 1}
    for wrong in ("2", "-1", "x", "1.0"):
        with pytest.raises(UsageError, match="from 0 to 1"):
            chosen_rank(wrong, 2)


def test_an_answer_that_changed_is_said_to_have() -> None:
    killed = {"rank": 0, "pid": 1, "new_pid": 2, "num_tokens_before": 24, "killed_s": 1.0, "resumed_s": 2.0}
    killed |= {"silence_s": 0.9, "detection_s": 0.1, "num_recomputed_tokens": 30, "same_as_undisturbed": False}
    lines = killed_lines(killed, {"num_tokens": 90, "tensor_parallel_size": 2}, has_standby=False)
    assert "ANOTHER answer" in lines[-1]
    assert any("0.90 s of silence" in line for line in lines)


@pytest.mark.live
@pytest.mark.cluster
def test_a_killed_workers_answer_is_the_answer_without_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rayllm", "demo", "--kill", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    killed = report["kill"]
    assert (killed["rank"], killed["num_faults"], killed["same_as_undisturbed"]) == (1, 1, True)
    assert killed["new_pid"] != killed["pid"]
    assert killed["resumed_s"] > killed["killed_s"]
    assert "dragon" in report["answer"]
