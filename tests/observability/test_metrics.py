from __future__ import annotations

from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from rayllm.messages import EngineStats
from rayllm.observability.metrics import Metrics, metric_names

STATS = EngineStats(
    ticket=1,
    healthy=True,
    reason="",
    num_running=3,
    num_waiting=4,
    num_blocks=100,
    num_blocks_used=25,
    num_slots_filled=380,
    num_preemptions=2,
    num_prompt_tokens=1000,
    num_generation_tokens=2000,
    prefix_queries=900,
    prefix_hits=300,
    num_steps=50,
    step_wait_s=0.5,
    num_faults=2,
    gap_s=1.5,
    num_recomputed_tokens=70,
)


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_drivers_figures_stand_under_vllms_names() -> None:
    samples = read(Metrics("tiny").render(STATS))

    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 1000,
        "vllm:generation_tokens_total": 2000,
        "vllm:num_preemptions_total": 2,
        "vllm:prefix_cache_queries_total": 900,
        "vllm:prefix_cache_hits_total": 300,
        "rayllm:engine_healthy": 1,
        "rayllm:steps_total": 50,
        "rayllm:step_wait_seconds_total": 0.5,
        "rayllm:worker_faults_total": 2,
        "rayllm:fault_gap_seconds": 1.5,
        "rayllm:recomputed_tokens_total": 70,
    }
    for name, value in expected.items():
        assert samples[name, (("model_name", "tiny"),)] == value


def test_a_share_of_nothing_is_nothing() -> None:
    stats = SimpleNamespace(**dict.fromkeys(EngineStats.__struct_fields__, 0))

    assert read(Metrics("m").render(stats))["vllm:kv_cache_usage_perc", (("model_name", "m"),)] == 0


def test_the_last_figures_stay_while_the_driver_does_not_answer() -> None:
    metrics = Metrics("m")
    assert b"vllm:prompt_tokens_total" not in metrics.render()

    metrics.render(STATS)

    assert read(metrics.render())["vllm:prompt_tokens_total", (("model_name", "m"),)] == 1000


def test_latencies_and_ends_are_counted_by_model_and_reason() -> None:
    metrics = Metrics("m")
    metrics.request_opened(7)
    metrics.first_token(0.0009)
    metrics.next_token(0.004)
    metrics.choice_finished("stop", 3, 0.02)
    metrics.request_refused("overloaded")
    name = ("model_name", "m")

    samples = read(metrics.render())
    assert samples["rayllm:requests_open", (name,)] == 1
    metrics.request_closed(0.5)
    samples = read(metrics.render())

    assert samples["rayllm:requests_open", (name,)] == 0
    assert samples["vllm:request_success_total", (("finished_reason", "stop"), name)] == 1
    assert samples["rayllm:requests_refused_total", (("code", "overloaded"), name)] == 1
    assert samples["vllm:time_to_first_token_seconds_bucket", (("le", "0.001"), name)] == 1
    assert samples["vllm:inter_token_latency_seconds_sum", (name,)] == 0.004
    assert samples["vllm:request_time_per_output_token_seconds_sum", (name,)] == 0.01
    assert samples["vllm:e2e_request_latency_seconds_count", (name,)] == 1


def test_the_names_are_these() -> None:
    assert metric_names() == [
        "rayllm:driver_losses",
        "rayllm:engine_healthy",
        "rayllm:engine_recovering",
        "rayllm:fault_detection_seconds",
        "rayllm:fault_gap_seconds",
        "rayllm:ingress_recomputed_tokens",
        "rayllm:kv_blocks",
        "rayllm:kv_slots_filled",
        "rayllm:recomputed_tokens",
        "rayllm:replay_gap_seconds",
        "rayllm:requests_open",
        "rayllm:requests_refused",
        "rayllm:requests_replayed",
        "rayllm:sequences_replayed",
        "rayllm:stalled_seconds",
        "rayllm:step_wait_seconds",
        "rayllm:steps",
        "rayllm:worker_faults",
        "vllm:e2e_request_latency_seconds",
        "vllm:generation_tokens",
        "vllm:inter_token_latency_seconds",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits",
        "vllm:prefix_cache_queries",
        "vllm:prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:request_prompt_tokens",
        "vllm:request_success",
        "vllm:request_time_per_output_token_seconds",
        "vllm:time_to_first_token_seconds",
    ]
