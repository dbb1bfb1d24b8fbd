"""Every metric, declared once: vLLM's names where they mean the same, ours as `rayllm:`.

Each carries `model_name` and `engine`, as vLLM's do, and the labels named here. `source` says who measures it: the
`driver` what is the engine's (one driver, one figure), an `ingress` what it serves itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fmt: off
LATENCY_EDGES_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.3, 0.5, 0.75, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0,
    7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
"""Of whole requests and their parts: vLLM's edges, and finer ones below."""
TOKEN_EDGES_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
# fmt: on
STEP_EDGES_S = (0.0001, 0.0002, 0.0005, *TOKEN_EDGES_S)
"""Between steps: the driver's share is a fraction of a millisecond."""
COUNT_EDGES = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
ITERATION_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICE_EDGES = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Declared:
    """`field`: where an `EngineStats` has it, for the driver's; two are divided, the first by the second."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    source: Literal["driver", "ingress"] = "ingress"
    fields: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    values: tuple[str, ...] = ()
    """Values of the only label that are shown from the start, with 0."""


def _gauge(name: str, text: str, *fields: str) -> Declared:
    return Declared(name, "gauge", text, "driver", fields)


def _total(name: str, text: str, *fields: str, labels: tuple[str, ...] = ()) -> Declared:
    return Declared(name, "counter", text, "driver", fields, labels)


def _steps(name: str, text: str, edges: tuple[float, ...], field: str) -> Declared:
    return Declared(name, "histogram", text, "driver", (field,), edges=edges)


def _served(name: str, text: str, *labels: str, values: tuple[str, ...] = ()) -> Declared:
    return Declared(name, "counter", text, labels=labels, values=values)


def _observed(name: str, text: str, edges: tuple[float, ...]) -> Declared:
    return Declared(name, "histogram", text, edges=edges)


FINISH_REASONS = ("stop", "length", "abort", "error")

_OF_THE_ENGINE = (
    _gauge("vllm:num_requests_running", "Sequences in the running batch.", "num_running"),
    _gauge("vllm:num_requests_waiting", "Sequences waiting to be scheduled.", "num_waiting"),
    _gauge("vllm:kv_cache_usage_perc", "Fraction of KV blocks in use; 1 means all.", "num_blocks_used", "num_blocks"),
    _total("vllm:num_preemptions", "Sequences preempted.", "num_preemptions"),
    _total("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    _total("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    _steps("vllm:iteration_tokens_total", "Tokens computed per step.", ITERATION_EDGES, "step_tokens"),
    Declared(
        "vllm:cache_config_info",
        "gauge",
        "Always 1; the labels hold the KV cache configuration.",
        "driver",
        labels=("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization"),
    ),
    _gauge("rayllm:engine_healthy", "1 while the engine is healthy.", "healthy"),
    _gauge("rayllm:engine_recovering", "1 while a failed worker is being replaced.", "recovering"),
    _gauge("rayllm:stalled_seconds", "Seconds since the last step while requests wait; 0 if idle.", "stalled_s"),
    _gauge("rayllm:kv_blocks", "KV blocks in all.", "num_blocks"),
    _gauge("rayllm:kv_slots_filled", "Filled token slots in used blocks.", "num_slots_filled"),
    _total("rayllm:steps", "Steps run.", "num_steps"),
    _total("rayllm:step_wait_seconds", "Seconds that workers were idle because no plan had arrived.", "step_wait_s"),
    _steps("rayllm:step_gap_seconds", "Idle time of workers before a step, while there is work.", STEP_EDGES_S,
           "step_gaps"),
    _total("rayllm:worker_faults", "Worker failures, by kind: crash or hang.", "faults", labels=("kind",)),
    _steps("rayllm:fault_detection_seconds", "Time from fault to detection.", LATENCY_EDGES_S, "fault_detections"),
    _steps("rayllm:fault_gap_seconds", "Time between the steps around a fault.", LATENCY_EDGES_S, "fault_gaps"),
    _total("rayllm:sequences_replayed", "Sequences resumed after a fault.", "num_replays"),
    _total("rayllm:recomputed_tokens", "Tokens whose KV was lost in faults and recomputed.", "num_recomputed_tokens"),
    _total("rayllm:admission_refusals", "Requests refused because of overload, by the limit exceeded.", "refusals",
           labels=("reason",)),
    _total("rayllm:driver_restarts", "Driver restarts.", "num_driver_restarts"),
)  # fmt: skip

_OF_AN_INGRESS = (
    _served("vllm:prompt_tokens", "Prompt tokens processed."),
    _served("vllm:prompt_tokens_cached", "Prompt tokens served by the prefix cache."),
    _served("vllm:generation_tokens", "Tokens generated."),
    _served("vllm:request_success", "Finished choices, by finish reason.", "finished_reason", values=FINISH_REASONS),
    _observed("vllm:request_prompt_tokens", "Prompt tokens per request.", COUNT_EDGES),
    _observed("vllm:request_prefill_kv_computed_tokens", "Prompt tokens computed per request.", COUNT_EDGES),
    _observed("vllm:request_generation_tokens", "Tokens of a choice.", COUNT_EDGES),
    _observed("vllm:request_max_num_generation_tokens", "Output tokens of a request's longest choice.", COUNT_EDGES),
    _observed("vllm:request_params_n", "Requested choices (n) per request.", CHOICE_EDGES),
    _observed("vllm:request_params_max_tokens", "Maximum output tokens (max_tokens) per choice.", COUNT_EDGES),
    _observed("vllm:time_to_first_token_seconds", "Time from arrival to a choice's first token.", LATENCY_EDGES_S),
    _observed("vllm:inter_token_latency_seconds", "Time between consecutive tokens of a choice.", TOKEN_EDGES_S),
    _observed("vllm:request_time_per_output_token_seconds", "Mean time per output token after the first.",
              TOKEN_EDGES_S),
    _observed("vllm:e2e_request_latency_seconds", "Time from arrival to a choice's end.", LATENCY_EDGES_S),
    _observed("vllm:request_queue_time_seconds", "Time in the driver's queue.", LATENCY_EDGES_S),
    _observed("vllm:request_prefill_time_seconds", "Time from first schedule to the first token.", LATENCY_EDGES_S),
    _observed("vllm:request_decode_time_seconds", "Time from the first to the last token.", LATENCY_EDGES_S),
    _observed("vllm:request_inference_time_seconds", "Time from first schedule to the last token.", LATENCY_EDGES_S),
    _served("http_requests", "HTTP requests, by route, method and status class.", "handler", "method", "status"),
    Declared("rayllm:requests_open", "gauge", "Open requests."),
    _served("rayllm:requests_refused", "Requests that ended with an error, by code.", "code"),
    _served("rayllm:driver_losses", "Lost connections to a driver."),
    _served("rayllm:requests_replayed", "Requests resumed on another driver."),
    _served("rayllm:ingress_recomputed_tokens", "Tokens recomputed for resumed requests."),
    _observed("rayllm:replay_gap_seconds", "Time from losing a driver to the next token.", LATENCY_EDGES_S),
)  # fmt: skip

METRICS = {metric.name: metric for metric in (*_OF_THE_ENGINE, *_OF_AN_INGRESS)}
