"""A collector of OpenTelemetry's traces by OTLP over HTTP, for as long as a test needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
"""In the environment of a server: spans are sent after so many milliseconds, not after five seconds."""


@dataclass(frozen=True)
class Span:
    """What a test asks of a span. Ids are in hexadecimal digits; `parent_id` is empty where it has none."""

    process: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str


@dataclass
class Collector:
    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)

    def of_trace(self, trace_id: str, num_spans: int, timeout_s: float = 20.0) -> list[Span]:
        """Waits until there are so many; also fewer, when the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [span for span in list(self.spans) if span.trace_id == trace_id]
            if len(found) >= num_spans or time.monotonic() > deadline:
                return found
            time.sleep(0.02)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.spans += _spans(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _spans(body: bytes) -> list[Span]:
    found = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                ids = (each.hex() for each in (span.trace_id, span.span_id, span.parent_span_id))
                found.append(Span(names["rayllm.process"], span.name, *ids))
    return found
