from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllm.observability.logs import escape, setup_logging


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("rayllm")
    before = (list(root.handlers), root.level, ours.level)
    yield
    for handler in [handler for handler in root.handlers if handler not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_client_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)

    logging.getLogger("rayllm.serve").info("path %s", "/v1/\r\nINFO:fake\x1b[31m\u2028\ud800")

    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("path /v1/\\r\\nINFO:fake\\x1b[31m\\u2028\\ud800\n")


def test_json_lines_hold_one_event_each() -> None:
    stream = io.StringIO()
    setup_logging("json", stream=stream)

    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("rayllm").exception("failed")

    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["level"], event["logger"]) == ("error", "rayllm")
    assert event["message"].startswith("failed\\nTraceback")


def test_other_libraries_are_heard_from_warnings_on() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)

    logging.getLogger("somewhere").info("noise")
    logging.getLogger("somewhere").warning("news")

    assert "noise" not in stream.getvalue()
    assert "WARNING somewhere: news" in stream.getvalue()


def test_the_last_setup_counts(tmp_path: Path) -> None:
    stream, file = io.StringIO(), tmp_path / "log"
    setup_logging(stream=stream)
    setup_logging(file=str(file), level=logging.WARNING)

    logging.getLogger("rayllm").info("quiet")
    logging.getLogger("rayllm").warning("said")

    assert stream.getvalue() == ""
    assert file.read_text().endswith("WARNING rayllm: said\n")


def test_very_long_text_is_cut() -> None:
    assert len(escape("a" * 1_000_000)) < 9000
