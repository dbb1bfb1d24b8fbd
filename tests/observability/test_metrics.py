from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayllm.messages import Distribution, EngineStats, IngressReport, Times
from rayllm.observability.declared import LATENCY_EDGES_S, METRICS, STEP_EDGES_S, TOKEN_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.observability.metrics import Metrics, metric_names

FAULTS = Histogram(LATENCY_EDGES_S)
FAULTS.observe(0.15)
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
    num_recomputed_tokens=70,
    faults={"crash": 2, "hang": 0},
    refusals={"max_queued_requests": 7},
    num_driver_restarts=1,
    fault_detections=FAULTS.snapshot(),
)
OWN = (("engine", "0"), ("model_name", "m"))


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_drivers_figures_stand_under_vllms_names() -> None:
    samples = read(Metrics("m").render(STATS))

    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 2,
        "vllm:prefix_cache_queries_total": 900,
        "vllm:prefix_cache_hits_total": 300,
        "rayllm:engine_healthy": 1,
        "rayllm:steps_total": 50,
        "rayllm:step_wait_seconds_total": 0.5,
        "rayllm:recomputed_tokens_total": 70,
        "rayllm:driver_restarts_total": 1,
        "rayllm:fault_detection_seconds_count": 1,
        "rayllm:fault_detection_seconds_sum": 0.15,
    }
    assert {name: samples[name, OWN] for name in expected} == expected
    assert samples["rayllm:worker_faults_total", (*OWN[:1], ("kind", "crash"), *OWN[1:])] == 2
    assert samples["rayllm:admission_refusals_total", (*OWN, ("reason", "max_queued_requests"))] == 7


def test_a_share_of_nothing_is_nothing() -> None:
    stats = msgspec.structs.replace(STATS, num_blocks=0, num_blocks_used=0)

    assert read(Metrics("m").render(stats))["vllm:kv_cache_usage_perc", OWN] == 0


def test_the_last_figures_stay_while_the_driver_does_not_answer() -> None:
    metrics = Metrics("m")
    assert b"vllm:num_preemptions_total" not in metrics.render()

    metrics.render(STATS)

    assert read(metrics.render())["vllm:num_preemptions_total", OWN] == 2


def _one_request(metrics: Metrics) -> None:
    """7 tokens in, of which 4 cached, 3 out of at most 9."""
    metrics.request_opened()
    metrics.first_token(0.25, Times(queued_s=0.1, prefill_s=0.15))
    metrics.prompt_done(7, 4, 1)
    for _ in range(2):
        metrics.next_token(0.004)
    metrics.tokens_generated(3)
    metrics.choice_finished("stop", 3, 9, elapsed_s=0.3, decode_s=0.008, prefill_s=0.15)
    metrics.request_finished(3)


def test_what_an_ingress_serves_stands_under_vllms_names() -> None:
    metrics = Metrics("m")
    _one_request(metrics)
    metrics.request_refused("overloaded")
    metrics.answered("/v1/completions", "POST", 200)

    samples = read(metrics.render())

    expected = {
        "vllm:prompt_tokens_total": 7,
        "vllm:prompt_tokens_cached_total": 4,
        "vllm:generation_tokens_total": 3,
        "vllm:request_prompt_tokens_sum": 7,
        "vllm:request_prefill_kv_computed_tokens_sum": 3,
        "vllm:request_generation_tokens_sum": 3,
        "vllm:request_max_num_generation_tokens_sum": 3,
        "vllm:request_params_n_sum": 1,
        "vllm:request_params_max_tokens_sum": 9,
        "vllm:time_to_first_token_seconds_sum": 0.25,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:request_time_per_output_token_seconds_sum": 0.004,
        "vllm:e2e_request_latency_seconds_sum": 0.3,
        "vllm:request_queue_time_seconds_sum": 0.1,
        "vllm:request_prefill_time_seconds_sum": 0.15,
        "vllm:request_decode_time_seconds_sum": 0.008,
        "vllm:request_inference_time_seconds_sum": 0.158,
        "rayllm:requests_open": 1,
    }
    assert {name: samples[name, OWN] for name in expected} == pytest.approx(expected)
    reasons = {reason: samples["vllm:request_success_total", (OWN[0], ("finished_reason", reason), OWN[1])]
               for reason in ("stop", "length", "abort", "error")}  # fmt: skip
    assert reasons == {"stop": 1, "length": 0, "abort": 0, "error": 0}
    assert samples["rayllm:requests_refused_total", (("code", "overloaded"), *OWN)] == 1
    labels = (OWN[0], ("handler", "/v1/completions"), ("method", "POST"), OWN[1], ("status", "2xx"))
    assert samples["http_requests_total", labels] == 1


def test_several_ingresses_are_told_apart_and_sum_to_what_was_served() -> None:
    asked, other = Metrics("m", ingress="a"), Metrics("m", ingress="b")
    _one_request(asked)
    for _ in range(2):
        _one_request(other)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(other.report()), type=IngressReport)

    samples = read(asked.render(STATS, [wire, asked.report()]))  # an old report of its own does not count

    served = {dict(labels)["ingress"]: value for (name, labels), value in samples.items()
              if name == "vllm:generation_tokens_total"}  # fmt: skip
    assert served == {"a": 3, "b": 6}
    assert sum(value for (name, _), value in samples.items() if name == "vllm:num_preemptions_total") == 2
    assert sum(value for (name, _), value in samples.items() if name == "vllm:request_queue_time_seconds_count") == 3


def test_a_value_is_counted_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((0.001, 0.01))
    for value in (0.0, 0.001, 0.0011, 5.0):
        histogram.observe(value)

    assert histogram.snapshot() == Distribution([2, 1, 1], pytest.approx(5.0021))


def test_buckets_go_down_to_a_millisecond_and_rise() -> None:
    for metric in METRICS.values():
        if metric.kind == "histogram":
            assert list(metric.edges) == sorted(set(metric.edges)), metric.name
    assert min(LATENCY_EDGES_S) == min(TOKEN_EDGES_S) == 0.001 > min(STEP_EDGES_S)


def test_edges_are_written_as_vllms_so_that_queries_for_one_find_it() -> None:
    shown = read(Metrics("m").render())
    edges = {dict(labels)["le"] for (name, labels) in shown if name == "vllm:e2e_request_latency_seconds_bucket"}
    assert {"0.3", "1.0", "2.5", "60.0", "7680.0", "+Inf"} <= edges


def test_each_figure_of_the_driver_is_one_that_it_sends() -> None:
    fields = {field for metric in METRICS.values() for field in metric.fields}
    assert fields <= set(EngineStats.__struct_fields__)
    assert all(metric.fields or metric.name == "vllm:cache_config_info"
               for metric in METRICS.values() if metric.source == "driver")  # fmt: skip


def test_how_the_cache_is_made_is_said_in_labels() -> None:
    info = {"block_size": 8, "cache_dtype": "bfloat16", "enable_prefix_caching": True, "gpu_memory_utilization": 0.9}

    [(_, labels)] = [key for key in read(Metrics("m", info).render(STATS)) if key[0] == "vllm:cache_config_info"]

    assert dict(labels)["num_gpu_blocks"] == "100"
    assert dict(labels)["block_size"] == "8"


def test_the_names_are_these() -> None:
    assert metric_names() == [
        "http_requests",
        "rayllm:admission_refusals",
        "rayllm:driver_losses",
        "rayllm:driver_restarts",
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
        "rayllm:step_gap_seconds",
        "rayllm:step_wait_seconds",
        "rayllm:steps",
        "rayllm:worker_faults",
        "vllm:cache_config_info",
        "vllm:e2e_request_latency_seconds",
        "vllm:generation_tokens",
        "vllm:inter_token_latency_seconds",
        "vllm:iteration_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits",
        "vllm:prefix_cache_queries",
        "vllm:prompt_tokens",
        "vllm:prompt_tokens_cached",
        "vllm:request_decode_time_seconds",
        "vllm:request_generation_tokens",
        "vllm:request_inference_time_seconds",
        "vllm:request_max_num_generation_tokens",
        "vllm:request_params_max_tokens",
        "vllm:request_params_n",
        "vllm:request_prefill_kv_computed_tokens",
        "vllm:request_prefill_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_queue_time_seconds",
        "vllm:request_success",
        "vllm:request_time_per_output_token_seconds",
        "vllm:time_to_first_token_seconds",
    ]
