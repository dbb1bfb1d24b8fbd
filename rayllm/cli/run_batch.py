"""`rayllm run-batch`: a file of requests in OpenAI's batch format, answered by a running server or by a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rayllm.cli.addresses import http_settings, server_url
from rayllm.cli.connect import add_server_flags
from rayllm.cli.flags import Parser, UsageError, add_config_flags
from rayllm.config import EngineConfig, Environment, parse_settings
from rayllm.errors import EngineUnreachableError

if TYPE_CHECKING:
    import httpx

_LINE_START = b'{"id": "batch_req_'
_CONNECTION_ERROR = "connection_error"
_STATUSES_OF_THE_MOMENT = frozenset({401, 403, 408, 425, 429})
"""Of those below 500: a wrong key and overload say nothing of the request."""
_NUM_TRIES = 6
_LONGEST_WAIT_S = 60.0
_PROGRESS_PERIOD_S = 1.0
_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Job:
    """A line of the input; `fault` says why it cannot be sent."""

    custom_id: str
    url: str
    body: dict[str, Any]
    fault: str = ""


@dataclass
class Tally:
    """How far a run is."""

    num_jobs: int
    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0


def parser() -> Parser:
    made = Parser(prog="rayllm run-batch", description="Run a file of requests in OpenAI's batch format.")
    made.add_argument("--input-file", "-i", required=True, metavar="FILE", help="JSON lines: custom_id, url, body")
    made.add_argument(
        "--output-file",
        "-o",
        required=True,
        metavar="FILE",
        help="one line per response; existing lines are kept, requests that failed on the server are sent again",
    )
    made.add_argument("--model", metavar="MODEL", help="start a server for this run instead of using a running one")
    made.add_argument("--max-concurrency", type=int, default=64, metavar="N", help="open requests (default: 64)")
    add_server_flags(made)
    add_config_flags(made, EngineConfig, only=("tensor_parallel_size", "dtype", "device", "max_model_len"))
    return made


def run(argv: Sequence[str]) -> int:
    """0 when every line was answered, 1 when some line of this run says an error. Lines whose custom_id the output
    has already are skipped, so that a run that was broken off goes on; but for those that failed for want of a server
    that could answer (5xx, 429, no connection) or of the right key: they are asked again.

    A new line is appended as soon as it is known, and counts instead of an earlier one with its custom_id; the earlier
    one is dropped at the end of a run.
    """
    given = parser().parse(argv)
    if given["max_concurrency"] < 1:
        raise UsageError(f"--max-concurrency {given['max_concurrency']} must be at least 1")
    if "model" in given and "url" in given:
        raise UsageError("give --url of a running server or a --model to start, not both")
    jobs = read_jobs(Path(given["input_file"]))
    output = Path(given["output_file"])
    done = finished_ids(output)
    left = [job for job in jobs if job.custom_id not in done]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} lines already have responses in {output}", file=sys.stderr)
    if not left:
        drop_replaced(output)
        return 0
    with _server(given) as url:
        tally = asyncio.run(_answer_all(url, given, left, output))
    drop_replaced(output)
    print(
        f"{tally.num_done} lines: {tally.num_done - tally.num_failed} answered, {tally.num_failed} failed -> {output}"
    )
    return 1 if tally.num_failed else 0


def read_jobs(path: Path) -> list[Job]:
    """The input's lines. `UsageError` for a file that cannot be read or whose lines cannot be told apart; a line that
    cannot be sent is a job with a fault."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"input file {str(path)!r} cannot be read: {error}") from None
    jobs = [_job(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise UsageError(f"input file {str(path)!r} holds no requests")
    seen: set[str] = set()
    for job in jobs:
        if job.custom_id in seen:
            raise UsageError(f"custom_id {job.custom_id!r} appears twice: custom_id must be unique")
        seen.add(job.custom_id)
    return jobs


def _job(line: str, number: int) -> Job:
    try:
        fields = json.loads(line)
    except ValueError as error:
        return Job(f"line-{number}", "", {}, f"line {number} is not JSON: {error}")
    if not isinstance(fields, dict):
        return Job(f"line-{number}", "", {}, f"line {number} is not a JSON object")
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return Job(f"line-{number}", "", {}, f"line {number} has no custom_id")
    if not isinstance(url, str) or not url.startswith("/"):
        return Job(custom_id, "", {}, f"url={url!r} must be a path like '/v1/chat/completions'")
    if not isinstance(body, dict):
        return Job(custom_id, url, {}, "body must be a JSON object")
    if fields.get("method", "POST") != "POST":
        return Job(custom_id, url, body, f"method={fields['method']!r} must be 'POST'")
    return Job(custom_id, url, body, "stream=true is not supported in a batch" if body.get("stream") else "")


def finished_ids(output: Path) -> set[str]:
    """The ids that an earlier run has written and that need not be asked again: all but those whose line tells of a
    fault that was not theirs. A last line that was torn is cut off, so that it is done again. Of several lines with
    one id the last counts. `UsageError`, and the file as it was, for one that is no output of ours."""
    if not output.exists():
        return set()
    if not output.is_file() or not os.access(output, os.R_OK | os.W_OK):
        raise UsageError(f"{str(output)!r} is not a readable and writable file: give another --output-file")
    is_final: dict[str, bool] = {}
    num_whole, torn = 0, b""
    with output.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                torn = line
                break
            num_whole += len(line)
            if line.strip():
                found = _output_line(line, output)
                is_final[found["custom_id"]] = not _may_do_better(found)
    if torn[: len(_LINE_START)] != _LINE_START[: len(torn)]:
        raise _no_output(output)
    if torn:
        os.truncate(output, num_whole)
    return {custom_id for custom_id, final in is_final.items() if final}


def _output_line(line: bytes, output: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
        return {"custom_id": str(found["custom_id"]), "response": found["response"], "error": found["error"]}
    except (ValueError, KeyError, TypeError):
        raise _no_output(output) from None


def _may_do_better(line: dict[str, Any]) -> bool:
    """Whether the same request may have another answer next time: it was not answered, or with a status that is none
    of the request's own."""
    response, error = line["response"], line["error"]
    if isinstance(response, dict):
        status = response.get("status_code")
        return isinstance(status, int) and (status >= 500 or status in _STATUSES_OF_THE_MOMENT)
    return isinstance(error, dict) and error.get("code") == _CONNECTION_ERROR


def drop_replaced(output: Path) -> None:
    """Leaves the last line of each id, where there are several. The file is whole at any time."""
    last: dict[str, int] = {}
    with output.open("rb") as lines:
        num_lines = 0
        for num_lines, line in enumerate(lines, 1):
            last[_output_line(line, output)["custom_id"]] = num_lines
    if len(last) == num_lines:
        return
    kept = set(last.values())
    target = output.resolve()  # a link stays one
    clean = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with output.open("rb") as lines, clean.open("wb") as out:
            shutil.copymode(target, clean)
            out.writelines(line for number, line in enumerate(lines, 1) if number in kept)
            out.flush()
            os.fsync(out.fileno())
        clean.replace(target)
    finally:
        clean.unlink(missing_ok=True)


def _no_output(output: Path) -> UsageError:
    return UsageError(f"{str(output)!r} is not an output file of run-batch: give another --output-file")


@contextlib.contextmanager
def _server(given: dict[str, Any]) -> Iterator[str]:
    """The URL to ask."""
    if "model" not in given:
        yield server_url(given.get("url"))
        return
    from rayllm.cli.serving import background_server, check_before_start

    settings = {name: given[name] for name in EngineConfig.model_fields if name in given}
    engine, server = parse_settings({**settings, "port": 0})
    check_before_start(engine, server)
    with background_server("run-batch", engine, server) as running:
        yield running.url


# ------------------------------------------------------------------------------------------------------- answering


async def _answer_all(url: str, given: dict[str, Any], jobs: Sequence[Job], output: Path) -> Tally:
    import httpx

    key = given.get("api_key") or Environment.api_key()
    tally, places = Tally(len(jobs)), asyncio.Semaphore(given["max_concurrency"])
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=given["max_concurrency"]),
        **http_settings(url),
    ) as http:
        await _check_there(http, url)
        with _opened(output) as out:

            async def answer(job: Job) -> None:
                async with places:
                    line = await _answer(http, job)
                _write(out, line, tally)

            progress = asyncio.create_task(_show_progress(tally))
            try:
                await asyncio.gather(*(answer(job) for job in jobs))
            finally:
                progress.cancel()
    return tally


def _opened(output: Path) -> TextIO:
    try:
        return output.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"output file {str(output)!r} cannot be written: {error.strerror}") from None


async def _check_there(http: httpx.AsyncClient, url: str) -> None:
    import httpx as library

    try:
        await http.get("/health", timeout=_CONNECT_TIMEOUT_S)
    except library.TimeoutException:
        return  # somebody listens; what it says to the requests counts
    except (library.HTTPError, library.InvalidURL):
        raise EngineUnreachableError(
            f"no server answers at {url}: start one with 'rayllm serve', or give a --model to start"
        ) from None


async def _answer(http: httpx.AsyncClient, job: Job) -> dict[str, Any]:
    """The output's line for a job. Overload and lost connections are waited out, a few times."""
    import httpx as library

    if job.fault:
        return _line(job, error={"code": "invalid_line", "message": job.fault})
    fault = ""
    for attempt in range(_NUM_TRIES):
        wait_s = min(_LONGEST_WAIT_S, 0.5 * 2**attempt)
        try:
            answer = await http.post(job.url, json=job.body)
        except library.TransportError as error:
            fault = f"the connection broke: {error or type(error).__name__}"
        else:
            if answer.status_code not in (429, 503) or attempt == _NUM_TRIES - 1:
                return _line(job, answer=answer)
            wait_s = _retry_after_s(answer, wait_s)
        if attempt < _NUM_TRIES - 1:
            await asyncio.sleep(wait_s)
    return _line(job, error={"code": _CONNECTION_ERROR, "message": fault})


def _retry_after_s(answer: httpx.Response, otherwise_s: float) -> float:
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(answer.headers["retry-after"])))
    except (KeyError, ValueError):
        return otherwise_s


def _line(job: Job, *, answer: httpx.Response | None = None, error: dict[str, str] | None = None) -> dict[str, Any]:
    """As OpenAI's batch output has it."""
    response = None
    if answer is not None:
        try:
            body = answer.json()
        except ValueError:
            body = {"error": {"message": answer.text[:1000]}}
        request_id = answer.headers.get("x-request-id", "")
        response = {"status_code": answer.status_code, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": job.custom_id, "response": response, "error": error}


def _write(out: TextIO, line: dict[str, Any], tally: Tally) -> None:
    out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()
    tally.num_done += 1
    response = line["response"]
    if response is None or response["status_code"] >= 400:
        tally.num_failed += 1
    elif isinstance(usage := response["body"].get("usage"), dict):
        tally.num_tokens += usage.get("completion_tokens") or 0


async def _show_progress(tally: Tally) -> None:
    """A line on stderr that is rewritten on a terminal; elsewhere one each ten seconds."""
    from rayllm.cli.terminal import is_terminal

    live = is_terminal(sys.stderr)
    began = time.monotonic()
    try:
        while True:
            await asyncio.sleep(_PROGRESS_PERIOD_S if live else 10 * _PROGRESS_PERIOD_S)
            _print_progress(tally, time.monotonic() - began, live)
    finally:
        if live:
            _print_progress(tally, time.monotonic() - began, live)
            print(file=sys.stderr)


def _print_progress(tally: Tally, elapsed_s: float, live: bool) -> None:
    text = (
        f"{tally.num_done} of {tally.num_jobs} lines, {tally.num_failed} failed, "
        f"{tally.num_tokens / max(elapsed_s, 0.001):.1f} tokens/s out"
    )
    print(f"\r\x1b[2K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
