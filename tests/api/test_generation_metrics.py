"""What a generation tells the metrics, from its first token to its end, however it ends."""

from __future__ import annotations

from typing import Any

import pytest
from api.fake_engine import EOS_ID, FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from rayllm.api.openai.completions import open_completion
from rayllm.api.service import ModelService
from rayllm.errors import EngineError


def _figures(service: ModelService) -> dict[str, float]:
    assert service.metrics is not None
    families = text_string_to_metric_families(service.metrics.render().decode())
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8, **fields}


async def test_tokens_times_and_ends_are_counted_for_each_choice(service: ModelService, engine: FakeEngine) -> None:
    engine.say = lambda request, choice: [10, 11, 12, EOS_ID][choice:]
    engine.num_cached_tokens = 2
    answer = await open_completion(_body(n=2), service)
    await answer.whole()
    answer.close()

    figures = _figures(service)
    expected = {
        "vllm:prompt_tokens_total": 3,
        "vllm:prompt_tokens_cached_total": 2,
        "vllm:generation_tokens_total": 7,
        "vllm:request_success_totalstop": 2,
        "vllm:request_success_totalabort": 0,
        "vllm:request_generation_tokens_sum": 7,
        "vllm:request_max_num_generation_tokens_sum": 4,
        "vllm:request_max_num_generation_tokens_count": 1,
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_max_tokens_sum": 16,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 5,
        "vllm:request_time_per_output_token_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_queue_time_seconds_count": 2,
        "vllm:request_prefill_time_seconds_count": 2,
        "vllm:request_decode_time_seconds_count": 2,
        "vllm:request_inference_time_seconds_count": 2,
        "rayllm:requests_open": 0,
    }
    assert {name: figures[name] for name in expected} == expected


async def test_a_client_that_leaves_is_an_abort_and_a_lost_engine_an_error(
    service: ModelService, engine: FakeEngine
) -> None:
    engine.say = lambda request, choice: [10, 11, 12, EOS_ID]
    left = await open_completion(_body(), service)
    await left.start()
    left.close()
    engine.fault_at = 2
    lost = await open_completion(_body(n=2), service)
    with pytest.raises(EngineError):
        await lost.whole()
    lost.close()

    figures = _figures(service)
    assert figures["vllm:request_success_totalabort"] == 1
    assert figures["vllm:request_success_totalerror"] == 2
    assert figures["vllm:e2e_request_latency_seconds_count"] == 3
    assert figures["rayllm:requests_open"] == 0
