"""What an ingress counts, and `/metrics`: its own figures, the other ingresses', and the driver's.

Each ingress counts what it serves itself, and the driver what is the engine's, so sums count nothing twice. Behind
one address with several ingresses, whichever is asked answers for all: their series carry a label `ingress` then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.utils import floatToGoString

from rayllm.messages import Distribution, EngineStats, IngressReport, Times
from rayllm.observability.declared import METRICS, Declared
from rayllm.observability.histogram import Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
_ENGINE = "0"
"""vLLM numbers its data-parallel engines; ours have an address each."""
_Labels = tuple[str, ...]


class Metrics:
    """The figures of one served model at one ingress. Times are in seconds; everything is called on one thread.

    `cache_info`: the labels of `vllm:cache_config_info` but the number of blocks, which the driver knows.
    """

    def __init__(self, model_name: str, cache_info: Mapping[str, object] | None = None, ingress: str = ""):
        self.model_name = model_name
        self._cache_info = dict(cache_info or {})
        self.ingress = ingress
        """This one's name among several; empty where it is alone."""
        self.num_open = 0
        self._stats: EngineStats | None = None
        own = [metric for metric in METRICS.values() if metric.source == "ingress"]
        self._counters: dict[str, dict[_Labels, float]] = {
            metric.name: {(value,): 0.0 for value in metric.values} if metric.labels else {(): 0.0}
            for metric in own
            if metric.kind != "histogram"
        }
        self._histograms = {metric.name: Histogram(metric.edges) for metric in own if metric.kind == "histogram"}
        self._inter_token = self._histograms["vllm:inter_token_latency_seconds"]
        self._generated = self._counters["vllm:generation_tokens"]

    # --------------------------------------------------------------------------------------------- what happens

    def request_opened(self) -> None:
        self.num_open += 1

    def request_closed(self) -> None:
        """Called once for each opened request, however it ended."""
        self.num_open -= 1

    def first_token(self, elapsed_s: float, times: Times | None) -> None:
        """Of a choice, since its request arrived. `times`: what the driver says of it."""
        self._observe("vllm:time_to_first_token_seconds", elapsed_s)
        if times is not None:
            self._observe("vllm:request_queue_time_seconds", times.queued_s)
            self._observe("vllm:request_prefill_time_seconds", times.prefill_s)

    def next_token(self, elapsed_s: float) -> None:
        self._inter_token.observe(elapsed_s)

    def tokens_generated(self, num_tokens: int) -> None:
        self._generated[()] += num_tokens

    def prompt_done(self, num_tokens: int, num_cached: int, num_choices: int) -> None:
        """The first token of a request's first choice is there: its prompt was computed."""
        self._count("vllm:prompt_tokens", amount=num_tokens)
        self._count("vllm:prompt_tokens_cached", amount=num_cached)
        self._observe("vllm:request_prompt_tokens", num_tokens)
        self._observe("vllm:request_prefill_kv_computed_tokens", num_tokens - num_cached)
        self._observe("vllm:request_params_n", num_choices)

    def choice_finished(
        self, reason: str, num_tokens: int, max_tokens: int, elapsed_s: float, decode_s: float, prefill_s: float
    ) -> None:
        """`elapsed_s`: since the request arrived; `decode_s`: from the first token to the last; `prefill_s`: from the
        choice's first run to its first token."""
        self._count("vllm:request_success", reason)
        self._observe("vllm:request_generation_tokens", num_tokens)
        self._observe("vllm:request_params_max_tokens", max_tokens)
        self._observe("vllm:e2e_request_latency_seconds", elapsed_s)
        if num_tokens:
            self._observe("vllm:request_decode_time_seconds", decode_s)
            self._observe("vllm:request_inference_time_seconds", prefill_s + decode_s)
        if num_tokens > 1:
            self._observe("vllm:request_time_per_output_token_seconds", decode_s / (num_tokens - 1))

    def request_finished(self, max_num_tokens: int) -> None:
        """All choices of a prompt have ended; the longest has `max_num_tokens`."""
        self._observe("vllm:request_max_num_generation_tokens", max_num_tokens)

    def request_refused(self, code: str) -> None:
        """`code` is one of a few words of ours; never a client's."""
        self._count("rayllm:requests_refused", code)

    def answered(self, handler: str, method: str, status: int) -> None:
        """An HTTP answer. `handler` is a route of ours, never a path as the client wrote it."""
        self._count("http_requests", handler, method, f"{status // 100}xx")

    def driver_lost(self) -> None:
        self._count("rayllm:driver_losses")

    def request_replayed(self, gap_s: float, num_tokens: int) -> None:
        """`gap_s` without a token for its client; `num_tokens` known ones computed again."""
        self._count("rayllm:requests_replayed")
        self._count("rayllm:ingress_recomputed_tokens", amount=num_tokens)
        self._observe("rayllm:replay_gap_seconds", gap_s)

    def _count(self, name: str, *labels: str, amount: float = 1) -> None:
        values = self._counters[name]
        values[labels] = values.get(labels, 0.0) + amount

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    # ------------------------------------------------------------------------------------------------ exposition

    def report(self) -> IngressReport:
        """All of it, for the ingress that is asked."""
        self._counters["rayllm:requests_open"][()] = self.num_open
        counters = {name: [(list(labels), v) for labels, v in found.items()] for name, found in self._counters.items()}
        histograms = {name: histogram.snapshot() for name, histogram in self._histograms.items()}
        return IngressReport(self.ingress, counters, histograms)

    def render(self, stats: EngineStats | None = None, others: Iterable[IngressReport] = ()) -> bytes:
        """The text of `/metrics`. `stats`: the driver's stats; the last ones stay while it does not answer."""
        if stats is not None:
            self._stats = stats
        reports = [self.report(), *(other for other in others if other.ingress != self.ingress)]
        reports.sort(key=lambda report: report.ingress)
        families = [*self._engine_families(), *self._ingress_families(reports)]
        return generate_latest(_Collected(families))

    def _engine_families(self) -> Iterator[Metric]:
        stats = self._stats
        if stats is None:
            return
        for metric in METRICS.values():
            if metric.source != "driver":
                continue
            family, labels = _family(metric), [self.model_name, _ENGINE]
            values = [getattr(stats, field) for field in metric.fields]
            if metric.name == "vllm:cache_config_info":
                info = {**self._cache_info, "num_gpu_blocks": stats.num_blocks}
                family.add_metric([*labels, *(str(info.get(name, "")) for name in metric.labels)], 1)
            elif metric.kind == "histogram":
                if values[0] is not None:
                    family.add_metric(labels, _buckets(metric.edges, values[0]), values[0].total)
            elif metric.labels:
                for label, value in sorted(values[0].items()):
                    family.add_metric([*labels, label], value)
            else:
                family.add_metric(labels, _quotient(*map(float, values)))
            yield family

    def _ingress_families(self, reports: list[IngressReport]) -> Iterator[Metric]:
        several = len(reports) > 1 or bool(self.ingress)
        for metric in METRICS.values():
            if metric.source != "ingress":
                continue
            family = _family(metric, ("ingress",) if several else ())
            for report in reports:
                labels = [self.model_name, _ENGINE, *((report.ingress,) if several else ())]
                if metric.kind == "histogram":
                    distribution = report.histograms[metric.name]
                    family.add_metric(labels, _buckets(metric.edges, distribution), distribution.total)
                    continue
                for own, value in report.counters[metric.name]:
                    family.add_metric([*labels, *own], value)
            yield family


class _Collected:
    """What `generate_latest` asks of a registry."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


def _family(metric: Declared, more_labels: _Labels = ()) -> Metric:
    return _FAMILIES[metric.kind](
        metric.name, metric.text, labels=("model_name", "engine", *more_labels, *metric.labels)
    )


def _buckets(edges: Sequence[float], distribution: Distribution) -> list[tuple[str, float]]:
    """Each edge, written as vLLM's are, with the number of values up to it, `+Inf` last.

    Counts of another length, from a process of another version, are a `ValueError`.
    """
    names = [*map(floatToGoString, edges), "+Inf"]
    num, buckets = 0, []
    for name, count in zip(names, distribution.counts, strict=True):
        num += count
        buckets.append((name, float(num)))
    return buckets


def _quotient(value: float, by: float | None = None) -> float:
    return value if by is None else value / by if by else 0.0


def metric_names() -> list[str]:
    """Every name that `/metrics` can show, sorted: without `_total` of counters, `_bucket` and the like."""
    return sorted(METRICS)
