"""A rank's side of the step channel: plans in, results out where it is the rank that answers."""

from __future__ import annotations

import contextlib
import gc
import logging
import time

import msgspec

from rayllm.executor.channel import Channel, PeerGoneError
from rayllm.executor.inproc import StepRunner, one_line
from rayllm.messages import StepPlan, WorkerFailure
from rayllm.observability.trace import Tracer

log = logging.getLogger(__name__)


def serve_plans(
    runner: StepRunner, rank: int, channel: Channel, tracer: Tracer | None = None, *, answers: bool
) -> str | None:
    """Computes plans until the driver closes the channel (None) or a step fails (the reason, which the driver gets
    too). A rank that `answers` sends each step's result."""
    decoder = msgspec.msgpack.Decoder(StepPlan)
    gc.collect()
    gc.freeze()  # weights and modules are not garbage: the collector need not look at them during a step
    epoch, idle_since = 0, time.perf_counter()
    while True:
        try:
            frame = channel.receive()
        except PeerGoneError:
            return None
        waited_s = time.perf_counter() - idle_since
        try:
            plan = decoder.decode(frame)
            epoch = plan.epoch
            started_at = time.monotonic()
            result = runner.execute(plan)
            if tracer is not None:
                trace_starts(tracer, plan, rank, started_at)
            if answers:
                channel.send(msgspec.structs.replace(result, waited_s=waited_s))
        except PeerGoneError:
            return None
        except Exception as error:
            reason = one_line(error)
            log.exception("step failed on rank %d", rank)
            with contextlib.suppress(PeerGoneError):
                channel.send(WorkerFailure(rank, epoch, reason))
            return reason
        idle_since = time.perf_counter()


def trace_starts(tracer: Tracer, plan: StepPlan, rank: int, started_at: float) -> None:
    """A span for each traced row that begins with the plan, which has been computed since `started_at`."""
    now = time.monotonic()
    for row in plan.new_rows:
        if row.traceparent:
            attributes = {"rayllm.rank": rank, "rayllm.step": plan.step, "rayllm.choice": row.choice}
            tracer.record("execute", row.traceparent, started_at, now, attributes)
