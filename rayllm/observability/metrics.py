"""Every metric, declared once: vLLM's names where they mean the same, ours as `rayllm:`.

What the engine counts (tokens, steps, blocks) comes as totals from the driver, and is shown as it came. What
only the ingress sees (latencies, refusals) is measured there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TOKEN_SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
_REQUEST_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


@dataclass(frozen=True)
class _EngineMetric:
    """A metric read from the driver's figures: `fields`, or the first divided by the second for a share."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    fields: tuple[str, ...]

    def value(self, stats: Any) -> float:
        values = [float(getattr(stats, field)) for field in self.fields]
        return values[0] if len(values) == 1 else values[0] / values[1] if values[1] else 0.0


_ENGINE_METRICS = (
    _EngineMetric("vllm:num_requests_running", "gauge", "Sequences that are in the running batch.", ("num_running",)),
    _EngineMetric("vllm:num_requests_waiting", "gauge", "Sequences that wait to be run.", ("num_waiting",)),
    _EngineMetric(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of KV blocks in use; 1 is all.",
        ("num_blocks_used", "num_blocks"),
    ),
    _EngineMetric("vllm:prompt_tokens", "counter", "Prompt tokens processed.", ("num_prompt_tokens",)),
    _EngineMetric("vllm:generation_tokens", "counter", "Tokens generated.", ("num_generation_tokens",)),
    _EngineMetric("vllm:num_preemptions", "counter", "Sequences preempted.", ("num_preemptions",)),
    _EngineMetric(
        "vllm:prefix_cache_queries",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        ("prefix_queries",),
    ),
    _EngineMetric("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.", ("prefix_hits",)),
    _EngineMetric("rayllm:engine_healthy", "gauge", "1 while the engine makes progress.", ("healthy",)),
    _EngineMetric("rayllm:kv_blocks", "gauge", "KV blocks in all.", ("num_blocks",)),
    _EngineMetric(
        "rayllm:kv_slots_filled", "gauge", "Token slots of used blocks that hold one.", ("num_slots_filled",)
    ),
    _EngineMetric("rayllm:steps", "counter", "Steps run.", ("num_steps",)),
    _EngineMetric(
        "rayllm:step_wait_seconds",
        "counter",
        "Seconds that workers stood idle for want of a plan.",
        ("step_wait_s",),
    ),
)


class _EngineCollector:
    """Gives Prometheus the figures that the driver sent last."""

    def __init__(self, model_name: str):
        self._model_name = model_name
        self.stats: Any = None

    def collect(self) -> Iterator[Metric]:
        for metric in _ENGINE_METRICS if self.stats is not None else ():
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            samples = family(metric.name, metric.text, labels=("model_name",))
            samples.add_metric((self._model_name,), metric.value(self.stats))
            yield samples


class Metrics:
    """The metrics of one served model, in a registry of their own. Times are in seconds."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._engine = _EngineCollector(model_name)
        self.registry.register(self._engine)
        self._finished = self._counter("vllm:request_success", "Choices that ended, by reason.", "finished_reason")
        self._refused = self._counter("rayllm:requests_refused", "Requests answered with an error.", "code")
        opened = Gauge("rayllm:requests_open", "Requests that are open.", ("model_name",), registry=self.registry)
        self._open_gauge = opened.labels(model_name)
        self.num_open = 0
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _REQUEST_SECONDS,
        )
        self._inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between the tokens of a choice.", _TOKEN_SECONDS
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time of a choice's tokens but the first.",
            _TOKEN_SECONDS,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_SECONDS
        )
        self._prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens of a choice.", _TOKENS)

    def request_opened(self, num_prompt_tokens: int) -> None:
        self.num_open += 1
        self._open_gauge.set(self.num_open)
        self._prompt_tokens.observe(num_prompt_tokens)

    def request_closed(self, elapsed_s: float) -> None:
        """Called once for each opened request, however it ended."""
        self.num_open -= 1
        self._open_gauge.set(self.num_open)
        self._whole.observe(elapsed_s)

    def first_token(self, elapsed_s: float) -> None:
        self._first_token.observe(elapsed_s)

    def next_token(self, elapsed_s: float) -> None:
        self._inter_token.observe(elapsed_s)

    def choice_finished(self, reason: str, num_tokens: int, decode_s: float) -> None:
        """`decode_s`: from the choice's first token to its last."""
        self._finished.labels(self._model_name, reason).inc()
        self._generated.observe(num_tokens)
        if num_tokens > 1:
            self._per_token.observe(decode_s / (num_tokens - 1))

    def request_refused(self, code: str) -> None:
        """`code` is one of a few words of ours; never a client's."""
        self._refused.labels(self._model_name, code).inc()

    def render(self, stats: Any = None) -> bytes:
        """The text of `/metrics`. `stats`: the driver's figures (`messages.EngineStats`); the last ones
        stay."""
        if stats is not None:
            self._engine.stats = stats
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ("model_name", label), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        metric = Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)


def metric_names() -> list[str]:
    """Every name that `/metrics` can show, sorted: without `_total`, `_bucket` and the like."""
    names = [metric.name for metric in _ENGINE_METRICS]
    names += [family.name for family in Metrics("any").registry.collect()]
    return sorted(set(names))
