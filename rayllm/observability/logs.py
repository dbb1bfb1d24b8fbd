"""One event, one line: text or JSON, control characters escaped, nothing of other libraries below a
warning."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

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
    """`2026-01-31 12:00:00.000 INFO rayllm.serve: message`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{moment}.{int(record.msecs):03d} {record.levelname} {record.name}"
        return f"{head}: {escape(_message(self, record))}"


class JsonFormatter(logging.Formatter):
    """A JSON object a line: `time` (Unix seconds), `level`, `logger`, `message`."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape(_message(self, record)),
        }
        return json.dumps(event, ensure_ascii=False)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


def setup_logging(
    log_format: LogFormat = "text",
    *,
    level: int = logging.INFO,
    stream: TextIO | None = None,
    file: str | None = None,
) -> None:
    """Logs RayLLM's events from `level` on, and warnings of everything else, to `file` or `stream` (stderr).

    May be called again; the last call counts.
    """
    handler: logging.Handler
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, (TextFormatter, JsonFormatter))]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("rayllm").setLevel(level)
