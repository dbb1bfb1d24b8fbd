"""One event, one line: text or JSON, control characters escaped, nothing of other libraries below a
warning. Prompts, answers and keys are never logged.

Every process of an engine sets its own up (`process`: ingress, driver, worker 0 ...), and those of one node may append
to one file. A line about a request carries its id: given by `extra={"request_id": ...}`, or the current request's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Literal, TextIO

from rayllm.observability.request_context import current_request

LogFormat = Literal["text", "json"]

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES = {**_CONTROL, 10: "\\n", 13: "\\r", 9: "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_MAX_TEXT = 8192


def escape(text: str) -> str:
    """Text that stays on its line, whatever a client put into it; very long text is cut."""
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}... ({len(text)} characters)"
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode()


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.000 INFO driver rayllm.engine.driver.loop: message [request id]`."""

    def __init__(self, process: str = ""):
        super().__init__()
        self._process = f"{process} " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{moment}.{int(record.msecs):03d} {record.levelname} {self._process}{record.name}"
        request_id = _request_id(record)
        return f"{head}: {escape(_message(self, record))}" + (f" [{escape(request_id)}]" if request_id else "")


class JsonFormatter(logging.Formatter):
    """A JSON object a line: `time` (Unix seconds), `level`, `process`, `logger`, `message`, `request_id` where there is
    one, and what the event gives as `extra={"fields": {...}}`."""

    def __init__(self, process: str = ""):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": escape(_message(self, record)),
        }
        if request_id := _request_id(record):
            event["request_id"] = escape(request_id)
        for name, value in getattr(record, "fields", {}).items():
            event[name] = escape(value) if isinstance(value, str) else value
        return json.dumps(event, ensure_ascii=False)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


def _request_id(record: logging.LogRecord) -> str:
    given = getattr(record, "request_id", None)
    if given is None:
        request = current_request.get()
        given = request.request_id if request is not None else ""
    return str(given)


class _LineFile(logging.Handler):
    """Appends each line by one write, so that lines of several processes do not mix."""

    def __init__(self, path: str):
        super().__init__()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._descriptor, (self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()


def setup_logging(
    log_format: LogFormat = "text",
    *,
    process: str = "",
    level: int = logging.INFO,
    stream: TextIO | None = None,
    file: str | None = None,
) -> None:
    """Logs RayLLM's events from `level` on, and warnings of everything else, to `file` or `stream` (stderr).

    A file that cannot be written (its folder is on another node) is replaced by the stream. May be called again; the
    last call counts.
    """
    handler = _handler(file, stream)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, (TextFormatter, JsonFormatter))]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("rayllm").setLevel(level)


def _handler(file: str | None, stream: TextIO | None) -> logging.Handler:
    if file is not None:
        try:
            return _LineFile(file)
        except OSError:
            pass
    return logging.StreamHandler(stream or sys.stderr)
