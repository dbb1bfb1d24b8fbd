"""What one answer took, as vLLM reports it with `--enable-per-request-metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.api.choice import Choice


def request_metrics(choices: Sequence[Choice]) -> dict[str, float] | None:
    """Milliseconds of the answer's one choice; None for an answer of several, whose times are not one request's.

    `queue_time_ms` is until it was first in a plan, `time_to_first_token_ms` from then to its first token,
    `generation_time_ms` from that to the last one, `mean_itl_ms` the mean between two tokens. What there is nothing to
    say of is left out.
    """
    if len(choices) != 1:
        return None
    [choice] = choices
    if choice.first_token_s is None:
        return {}
    num_tokens, generation_s = len(choice.token_ids), choice.last_token_s - choice.first_token_s
    found = {
        "time_to_first_token_ms": choice.prefill_s * 1000,
        "generation_time_ms": generation_s * 1000,
        "queue_time_ms": choice.queued_s * 1000,
    }
    if num_tokens > 1:
        found["mean_itl_ms"] = generation_s * 1000 / (num_tokens - 1)
    if choice.prefill_s + generation_s > 0:
        found["tokens_per_second"] = num_tokens / (choice.prefill_s + generation_s)
    return found
