"""`rayllm demo --kill`: a worker is killed while its answer streams; what happened then, and how long it took.

The server is started with fault injection on, and the kill is the request that the dashboard's button sends.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayllm.errors import RayLLMError

if TYPE_CHECKING:
    from rayllm.cli.answer import Timing
    from rayllm.cli.client import ApiClient
    from rayllm.cli.terminal import Screen
    from rayllm.serve.running_server import RunningServer

QUESTION = "Tell me a story about a dragon."
"""An answer long enough for a person to see it go on."""
_TOKENS_BEFORE_KILL = 24
_STANDBY_TIMEOUT_S = 30.0
_POLL_S = 0.1


class KillFailedError(RayLLMError):
    """The demonstration did not show what it is there for."""


@dataclass
class KilledStream:
    """An answer during which a worker was killed. Times are seconds after the question."""

    parts: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each part came."""
    killed: dict[str, Any] = field(default_factory=dict)
    """What the server says that it killed."""
    killed_s: float = 0.0
    num_tokens_before: int = 0

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def silence(self) -> tuple[float, float]:
        """How long the stream was silent round the kill, and when it went on."""
        after = next((at for at in self.times_s if at > self.killed_s), self.killed_s)
        gaps = [(late - early, late) for early, late in zip(self.times_s, self.times_s[1:]) if late >= after]
        return max(gaps, default=(0.0, self.killed_s))


def wait_for_standby(screen: Screen, running: RunningServer) -> bool:
    """Whether a spare worker is ready to take a lost one's place."""
    screen.stage("starting a standby worker")
    deadline = time.monotonic() + _STANDBY_TIMEOUT_S
    while not (is_ready := running.describe().standby_is_ready) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    screen.end_stages(ok=is_ready)
    return is_ready


def chosen_rank(given: str, num_ranks: int) -> int:
    """The rank that `--kill` names, or any. `UsageError` for one that there is not."""
    from rayllm.cli.flags import UsageError

    if not given:
        return random.randrange(num_ranks)
    if not given.isdigit() or int(given) >= num_ranks:
        allowed = f"a rank from 0 to {num_ranks - 1}" if num_ranks > 1 else "0, the only rank"
        raise UsageError(f"--kill {given}: give {allowed}, or no rank for a random one")
    return int(given)


def stream_and_kill(
    screen: Screen,
    client: ApiClient,
    messages: list[dict[str, str]],
    params: dict[str, Any],
    timing: Timing,
    rank: int,
    *,
    quiet: bool,
) -> KilledStream:
    """Shows the answer as it comes and kills the rank while it does. `KillFailedError` where it could not be killed or
    the answer had ended before."""
    seen, began = KilledStream(), time.perf_counter()
    failures: list[Exception] = []

    def kill() -> None:
        try:
            seen.killed = client.post("/admin/kill_worker", {"rank": rank})
            seen.killed_s = time.perf_counter() - began
        except Exception as error:
            failures.append(error)
        else:
            _show(screen, f" [kill -9 {seen.killed['pid']}: worker rank {rank}] ", quiet=quiet, loud=True)

    killer = threading.Thread(target=kill, name="killer")
    for piece in client.stream_chat(messages, params, timing):
        seen.parts.append(piece.text)
        seen.times_s.append(time.perf_counter() - began)
        _show(screen, piece.text, quiet=quiet)
        if timing.num_tokens >= _TOKENS_BEFORE_KILL and not seen.num_tokens_before:
            seen.num_tokens_before = timing.num_tokens
            killer.start()
    if not seen.num_tokens_before:
        raise KillFailedError(
            f"the answer ended after {timing.num_tokens} tokens, before the kill: ask a question with a longer answer"
        )
    killer.join()
    if failures:
        raise KillFailedError(f"the worker could not be killed: {failures[0]}")
    return seen


def _show(screen: Screen, text: str, *, quiet: bool, loud: bool = False) -> None:
    if not quiet:
        screen.print(f"\x1b[1;31m{text}\x1b[0m" if loud and screen.is_terminal else text, end="")


def kill_report(
    client: ApiClient,
    running: RunningServer,
    seen: KilledStream,
    messages: list[dict[str, str]],
    params: dict[str, Any],
) -> dict[str, Any]:
    """What came of it: timings of the stream as its reader saw them and of the engine, and whether the same question
    without a kill has the same answer."""
    from rayllm.cli.answer import Timing

    metrics = client.get_checked("/metrics").text
    silence_s, resumed_s = seen.silence()
    rank = int(seen.killed["rank"])
    undisturbed = "".join(piece.text for piece in client.stream_chat(messages, params, Timing()))
    return {
        "rank": rank,
        "pid": seen.killed["pid"],
        "new_pid": running.describe().workers[rank].pid,
        "num_tokens_before": seen.num_tokens_before,
        "killed_s": round(seen.killed_s, 3),
        "resumed_s": round(resumed_s, 3),
        "silence_s": round(silence_s, 3),
        "detection_s": round(_sum(metrics, "rayllm:fault_detection_seconds_sum"), 3),
        "num_faults": int(_sum(metrics, "rayllm:worker_faults_total")),
        "num_recomputed_tokens": int(_sum(metrics, "rayllm:recomputed_tokens_total")),
        "same_as_undisturbed": undisturbed == seen.text,
    }


def _sum(metrics: str, name: str) -> float:
    """A metric's value, over all its labels."""
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE))


def killed_lines(killed: dict[str, Any], report: dict[str, Any], *, has_standby: bool) -> Sequence[str]:
    """What happened, as a person reads it: `kill_report`, and the demo's report beside it."""
    rank, is_same = killed["rank"], killed["same_as_undisturbed"]
    by = "the standby worker" if has_standby else "a new worker"
    noticed_s = killed["killed_s"] + killed["detection_s"]
    return [
        "What happened, in seconds after the question:",
        f"  {killed['killed_s']:6.2f} s  worker rank {rank} of {report['tensor_parallel_size']} (pid {killed['pid']}) "
        f"was killed, after {killed['num_tokens_before']} tokens",
        f"  {noticed_s:6.2f} s  the driver noticed it; {by} (pid {killed['new_pid']}) became rank {rank}",
        f"  {killed['resumed_s']:6.2f} s  the stream went on, after {killed['silence_s']:.2f} s of silence; "
        f"{killed['num_recomputed_tokens']} tokens were computed again",
        f"All {report['num_tokens']} tokens came in one response. Asked again without a kill, the model "
        + ("gave the same answer, character for character." if is_same else "gave ANOTHER answer."),
    ]
