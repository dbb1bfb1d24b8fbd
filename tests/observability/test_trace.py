"""Spans of a request, from the ingress, the driver and the workers, taken by an exporter in memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from fakes import FakeExecutor, fake_config, make_request
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve.served import ANSWER, Served, completion, tokenizer

from rayllm.config import EngineConfig
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.local import build_scheduler
from rayllm.errors import ConfigError
from rayllm.executor.plan_server import trace_starts
from rayllm.messages import Submit
from rayllm.observability.trace import Tracer
from rayllm.scheduler.scheduler import Scheduler

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class _Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer("", "test", self.exporter)

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def _duration_s(span: Any) -> float:
    return float(span.end_time - span.start_time) / 1e9


async def test_a_request_is_a_span_below_the_clients_with_what_it_took() -> None:
    traced = _Traced()
    served = Served(tracer=traced.tracer)
    async with served.client() as client:
        headers = {"traceparent": CLIENT, "x-request-id": "job-7"}
        await client.post("/v1/completions", json=completion(temperature=0.5), headers=headers)
        await client.get("/health")

    spans = traced.spans()
    assert set(spans) == {"llm_request", "prepare", "respond"}
    request = spans["llm_request"]
    assert f"{request.context.trace_id:032x}" == TRACE_ID
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert {spans[name].parent.span_id for name in ("prepare", "respond")} == {request.context.span_id}
    expected = {
        "gen_ai.request.id": "job-7",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.completion_tokens": len(tokenizer().encode(ANSWER)) + 1,
        "gen_ai.latency.time_in_queue": 0.25,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert {name: request.attributes[name] for name in expected} == expected
    assert 0 < request.attributes["gen_ai.latency.time_to_first_token"] <= request.attributes["gen_ai.latency.e2e"]
    assert served.engine.requests[0].traceparent == f"00-{TRACE_ID}-{request.context.span_id:016x}-01"


@pytest.mark.parametrize("given", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
async def test_without_a_good_parent_a_trace_begins_here(given: str) -> None:
    traced = _Traced()
    async with Served(tracer=traced.tracer).client() as client:
        await client.post("/v1/completions", json=completion(), headers={"traceparent": given} if given else {})

    assert traced.spans()["llm_request"].parent is None


async def test_what_the_client_does_not_sample_costs_nothing_further_on() -> None:
    traced = _Traced()
    served = Served(tracer=traced.tracer)
    async with served.client() as client:
        await client.post("/v1/completions", json=completion(), headers={"traceparent": CLIENT[:-1] + "0"})

    assert traced.spans() == {}
    assert served.engine.requests[0].traceparent == ""


async def test_an_engine_that_fails_makes_the_span_an_error() -> None:
    traced = _Traced()
    served = Served(tracer=traced.tracer)
    served.engine.fault_at = 2
    async with served.client() as client:
        await client.post("/v1/completions", json=completion(stream=True))

    assert traced.spans()["llm_request"].status.status_code.name == "ERROR"


def test_the_driver_adds_queue_prefill_and_decode_which_follow_each_other() -> None:
    traced, now = _Traced(), [0.0]
    config, executor = fake_config(max_num_seqs=1), FakeExecutor(max_inflight_steps=1, dies=[4])
    scheduler = build_scheduler(config, executor.num_blocks)
    clock, tracer = lambda: now[0], traced.tracer
    loop = EngineLoop(config, scheduler, executor, lambda client, message: None, clock=clock, tracer=tracer)
    request = make_request([1, 2, 3], max_tokens=6)
    loop.submit("a", Submit(0, request))
    now[0] += 2  # it waits, untraced requests before it
    loop.submit("a", Submit(1, msgspec.structs.replace(request, traceparent=CLIENT)))
    while loop.step():
        now[0] += 1

    spans = traced.spans()
    assert set(spans) == {"queue", "prefill", "decode"}
    assert {f"{span.parent.span_id:016x}" for span in spans.values()} == {"b7ad6b7169203331"}
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert _duration_s(spans["queue"]) == pytest.approx(6 + 1, abs=1.01)  # the other's six steps, one of them twice
    assert _duration_s(spans["decode"]) == pytest.approx(5)


def test_a_worker_adds_the_step_that_a_choice_begins_with() -> None:
    traced = _Traced()
    scheduler: Scheduler = build_scheduler(fake_config(), 64)
    scheduler.add(msgspec.structs.replace(make_request([1, 2], n=2), traceparent=CLIENT))
    scheduler.add(make_request([3, 4], request_id="untraced"))
    plan = scheduler.plan()
    assert plan is not None

    trace_starts(traced.tracer, plan, rank=1, started_at=0.0)

    spans = traced.exporter.get_finished_spans()
    assert {span.name for span in spans} == {"execute"}
    assert {(span.attributes["rayllm.rank"], span.attributes["rayllm.step"]) for span in spans} == {(1, plan.step)}
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE_ID}


def test_the_sdk_is_not_imported_unless_it_is_asked_for() -> None:
    program = (
        "import sys, rayllm.serve.app, rayllm.engine.driver.loop, rayllm.executor.worker; "
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_a_collectors_address_that_cannot_work_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint='grpc://x:4317'.*http://HOST:4318/v1/traces"):
        EngineConfig.parse({"otlp_traces_endpoint": "grpc://x:4317"})
    assert EngineConfig(otlp_traces_endpoint="http://x:4318/v1/traces").otlp_traces_endpoint
