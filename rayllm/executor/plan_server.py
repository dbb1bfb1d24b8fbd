"""A rank's side of the step channel: plans in, results out where it is the rank that answers."""

from __future__ import annotations

import contextlib
import gc
import logging
import time

import msgspec

from rayllm.executor.channel import Channel, PeerGoneError
from rayllm.executor.inproc import one_line
from rayllm.executor.pipeline import StepPipeline, StepRunner
from rayllm.messages import StepPlan, WorkerFailure
from rayllm.observability.trace import Tracer

log = logging.getLogger(__name__)


_POLL_S = 20e-6
"""How long to sleep between looks for another plan and for the end of the step that the device computes."""


def serve_plans(
    runner: StepRunner, rank: int, channel: Channel, tracer: Tracer | None = None, *, answers: bool
) -> str | None:
    """Computes plans until the driver closes the channel (None) or a step fails (the reason, which the driver gets
    too). A rank that `answers` sends each step's result."""
    decoder = msgspec.msgpack.Decoder(StepPlan)
    gc.collect()
    gc.freeze()  # weights and modules are not garbage: the collector need not look at them during a step
    pipeline = StepPipeline(runner)
    epoch, idle_since, waited_s = 0, time.perf_counter(), 0.0
    while True:
        try:
            frame = _next_plan(channel, pipeline)
            if frame is not None:
                if not pipeline:
                    waited_s = time.perf_counter() - idle_since
                plan = decoder.decode(frame)
                epoch = plan.epoch
                pipeline.add(plan)
                continue
            finished = pipeline.finish()
            if tracer is not None:
                trace_starts(tracer, finished.plan, rank, finished.launched_at)
            if answers:
                channel.send(msgspec.structs.replace(finished.result, waited_s=waited_s))
            pipeline.launch_ahead()
        except PeerGoneError:
            return None
        except Exception as error:
            reason = one_line(error)
            log.exception("step failed on rank %d", rank)
            with contextlib.suppress(PeerGoneError):
                channel.send(WorkerFailure(rank, epoch, reason))
            return reason
        idle_since, waited_s = time.perf_counter(), 0.0


def _next_plan(channel: Channel, pipeline: StepPipeline) -> memoryview | None:
    """The driver's next plan; None where the oldest one is to be finished first."""
    if not pipeline:
        return channel.receive()
    while pipeline.may_launch_more and not pipeline.is_done:
        frame = channel.receive_now()
        if frame is not None:
            return frame
        time.sleep(_POLL_S)
    return None


def trace_starts(tracer: Tracer, plan: StepPlan, rank: int, started_at: float) -> None:
    """A span for each traced row that begins with the plan, which has been computed since `started_at`."""
    now = time.monotonic()
    for row in plan.new_rows:
        if row.traceparent:
            attributes = {"rayllm.rank": rank, "rayllm.step": plan.step, "rayllm.choice": row.choice}
            tracer.record("execute", row.traceparent, started_at, now, attributes)
