from __future__ import annotations

from rayllm.request import CompletionOutput, RequestMetrics, RequestOutput


def test_an_output_without_its_optional_fields_is_one_that_still_runs() -> None:
    choice = CompletionOutput(index=0, text="", token_ids=[])
    output = RequestOutput("id", "text", [1], [choice], finished=False)
    assert (choice.finish_reason, choice.stop_reason, choice.error, choice.logprobs) == (None, None, None, None)
    assert output.metrics == RequestMetrics(first_token_s=None, finished_s=None, num_cached_tokens=0)


def test_two_outputs_share_no_metrics() -> None:
    first, second = (RequestOutput(name, None, [1], [], finished=False) for name in "ab")
    first.metrics.num_cached_tokens = 3
    assert second.metrics.num_cached_tokens == 0
