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
    _gauge("vllm:num_requests_waiting", "Sequences that wait to be run.", "num_waiting"),
    _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", "num_blocks_used", "num_blocks"),
    _total("vllm:num_preemptions", "Sequences preempted.", "num_preemptions"),
    _total("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    _total("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    _steps("vllm:iteration_tokens_total", "Tokens computed in a step.", ITERATION_EDGES, "step_tokens"),
    Declared(
        "vllm:cache_config_info",
        "gauge",
        "Always 1; its labels say how the KV cache is made.",
        "driver",
        labels=("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization"),
    ),
    _gauge("rayllm:engine_healthy", "1 while the engine makes progress.", "healthy"),
    _gauge("rayllm:engine_recovering", "1 while a lost worker is replaced.", "recovering"),
    _gauge("rayllm:stalled_seconds", "Since the last step while work waits; 0 without work.", "stalled_s"),
    _gauge("rayllm:kv_blocks", "KV blocks in all.", "num_blocks"),
    _gauge("rayllm:kv_slots_filled", "Token slots of used blocks that hold one.", "num_slots_filled"),
    _total("rayllm:steps", "Steps run.", "num_steps"),
    _total("rayllm:step_wait_seconds", "Seconds that workers stood idle for want of a plan.", "step_wait_s"),
    _steps("rayllm:step_gap_seconds", "Idle time of the workers before a step, while there is work.", STEP_EDGES_S,
           "step_gaps"),
    _total("rayllm:worker_faults", "Workers lost, by kind: crash or hang.", "faults", labels=("kind",)),
    _steps("rayllm:fault_detection_seconds", "From a fault until it was noticed.", LATENCY_EDGES_S, "fault_detections"),
    _steps("rayllm:fault_gap_seconds", "Between the steps round a fault.", LATENCY_EDGES_S, "fault_gaps"),
    _total("rayllm:sequences_replayed", "Sequences taken up again after a fault.", "num_replays"),
    _total("rayllm:recomputed_tokens", "Tokens whose KV was lost to faults.", "num_recomputed_tokens"),
    _total("rayllm:admission_refusals", "Requests refused for overload, by the limit they met.", "refusals",
           labels=("reason",)),
    _total("rayllm:driver_restarts", "Drivers that had to be replaced.", "num_driver_restarts"),
)  # fmt: skip

_OF_AN_INGRESS = (
    _served("vllm:prompt_tokens", "Prompt tokens of requests whose first token came."),
    _served("vllm:prompt_tokens_cached", "Those that the prefix cache served."),
    _served("vllm:generation_tokens", "Tokens generated."),
    _served("vllm:request_success", "Choices that ended, by reason.", "finished_reason", values=FINISH_REASONS),
    _observed("vllm:request_prompt_tokens", "Prompt tokens of a request.", COUNT_EDGES),
    _observed("vllm:request_prefill_kv_computed_tokens", "Those that the prefix cache did not serve.", COUNT_EDGES),
    _observed("vllm:request_generation_tokens", "Tokens of a choice.", COUNT_EDGES),
    _observed("vllm:request_max_num_generation_tokens", "Tokens of a request's longest choice.", COUNT_EDGES),
    _observed("vllm:request_params_n", "Choices that a request asked for.", CHOICE_EDGES),
    _observed("vllm:request_params_max_tokens", "Tokens that a choice might have had.", COUNT_EDGES),
    _observed("vllm:time_to_first_token_seconds", "From arrival to a choice's first token.", LATENCY_EDGES_S),
    _observed("vllm:inter_token_latency_seconds", "Between the tokens of a choice.", TOKEN_EDGES_S),
    _observed("vllm:request_time_per_output_token_seconds", "Mean time of a choice's tokens but the first.",
              TOKEN_EDGES_S),
    _observed("vllm:e2e_request_latency_seconds", "From arrival to a choice's end.", LATENCY_EDGES_S),
    _observed("vllm:request_queue_time_seconds", "In the driver's queue, until first run.", LATENCY_EDGES_S),
    _observed("vllm:request_prefill_time_seconds", "From first run to the first token.", LATENCY_EDGES_S),
    _observed("vllm:request_decode_time_seconds", "From the first token to the last.", LATENCY_EDGES_S),
    _observed("vllm:request_inference_time_seconds", "From first run to the last token.", LATENCY_EDGES_S),
    _served("http_requests", "HTTP requests by route, method and class of status.", "handler", "method", "status"),
    Declared("rayllm:requests_open", "gauge", "Requests that are open."),
    _served("rayllm:requests_refused", "Requests answered with an error, by code.", "code"),
    _served("rayllm:driver_losses", "Connections to a driver that were lost."),
    _served("rayllm:requests_replayed", "Requests that went on with another driver than they began with."),
    _served("rayllm:ingress_recomputed_tokens", "Known tokens that replayed requests had computed again."),
    _observed("rayllm:replay_gap_seconds", "From the loss of a driver to a request's next token.", LATENCY_EDGES_S),
)  # fmt: skip

METRICS = {metric.name: metric for metric in (*_OF_THE_ENGINE, *_OF_AN_INGRESS)}
