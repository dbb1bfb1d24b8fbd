import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rayllm.cli.bench.serve import Sample, summarize
from rayllm.cli.bench.startup import _watch
from rayllm.cli.bench.stats import percentile
from rayllm.cli.client import ApiClient
from rayllm.cli.main import main
from rayllm.errors import EngineError


class _Handler(BaseHTTPRequestHandler):
    """An OpenAI server that streams three tokens, and refuses the prompts from the fourth on where told to."""

    asked: list[dict[str, Any]]
    at: list[float]
    num_good: int
    has_tokenize = True
    stages: list[str]
    key = ""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            stage = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
            return self._send(200 if stage == "ready" else 503, {"stage": stage})
        if self.key and self.headers["authorization"] != f"Bearer {self.key}":
            return self._send(401, {"error": {"message": "wrong key"}})
        return self._send(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":  # two tokens a word
            return self._send(200 if self.has_tokenize else 404, {"count": 2 * len(body["prompt"].split())})
        kind = type(self)
        kind.asked.append(body)
        kind.at.append(time.perf_counter())
        if len(kind.asked) > kind.num_good:
            return self._send(400, {"error": {"message": "no such thing"}})
        self.send_response(200)
        self.end_headers()
        for word in "abc":
            self._event({"choices": [{"text": word}]})
            time.sleep(0.01)
        self._event({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, event: Any) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[tuple[type[_Handler], str]]:
    handler = type("_OneHandler", (_Handler,), {"asked": [], "at": [], "num_good": 999, "stages": ["ready"]})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def test_percentiles_fall_between_values() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([5.0], 99) == 5.0
    assert percentile([], 99) == 0.0


def test_latencies_follow_from_what_the_client_saw() -> None:
    samples = [
        Sample([0.1, 0.2, 0.4], end_s=0.5, num_prompt_tokens=7, num_tokens=3),
        Sample(error="no"),
    ]
    found = summarize(samples, 2.0, {"request_rate": float("inf")})
    assert (found["completed"], found["failed"], found["request_throughput"]) == (1, 1, 0.5)
    assert (found["mean_ttft_ms"], found["mean_tpot_ms"], found["mean_e2el_ms"]) == (100.0, 150.0, 500.0)
    assert (found["p50_itl_ms"], found["total_token_throughput"]) == (150.0, 5.0)


def test_results_are_printed_in_vllms_form(
    server: tuple[type[_Handler], str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--num-prompts", "5", "--input-len", "8", "--output-len", "3", "--request-rate", "200", "--json"]
    assert main(["bench", "serve", "--url", server[1], *argv]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert any(line.split() == ["Successful", "requests:", "5"] for line in lines)
    assert "---------------Time to First Token----------------" in lines
    found = json.loads(last)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40, 15)
    assert found["mean_itl_ms"] >= 5
    warm_up, *asked = server[0].asked
    assert warm_up["max_tokens"] == 1
    assert {body["ignore_eos"] for body in asked} == {True}
    assert {len(body["prompt"].split()) for body in asked} == {4}


def test_arrivals_do_not_wait_for_answers(server: tuple[type[_Handler], str]) -> None:
    server[0].has_tokenize = False
    argv = ["--num-prompts", "8", "--output-len", "3", "--request-rate", "100", "--no-ignore-eos"]
    assert main(["bench", "serve", "--url", server[1], *argv]) == 0
    at = server[0].at[1:]
    assert 0.02 < max(at) - min(at) < 8 * 0.03
    assert "ignore_eos" not in server[0].asked[1]


def test_failures_are_counted_and_told(server: tuple[type[_Handler], str], capsys: pytest.CaptureFixture[str]) -> None:
    server[0].num_good = 3
    assert main(["bench", "serve", "--url", server[1], "--num-prompts", "5", "--max-concurrency", "1"]) == 1
    captured = capsys.readouterr()
    assert any(line.split() == ["Failed", "requests:", "3"] for line in captured.out.splitlines())
    assert "3 requests failed; first error: 400" in captured.err


def test_a_missing_key_is_told_with_the_fix(
    server: tuple[type[_Handler], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLLM_API_KEY", raising=False)
    server[0].key = "sekret"
    for command in (["bench", "serve"], ["complete", "hi"]):
        assert main([*command, "--url", server[1]]) == 1
        said = f"401 from {server[1]}: wrong key (give --api-key KEY, or set RLLM_API_KEY)\n"
        assert capsys.readouterr().err == f"rayllm {command[0]}: {said}"


def test_no_server_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 3
    assert "rayllm serve" in capsys.readouterr().err


def test_startup_is_timed_in_three_steps(server: tuple[type[_Handler], str]) -> None:
    server[0].stages = ["starting Ray", "loading weights", "ready"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            with ApiClient(server[1]) as client:
                found = _watch(client, process, time.monotonic(), 30)
        finally:
            process.kill()
    assert 0 < found["port_open_s"] < found["ready_s"] < found["first_token_s"]


def test_a_server_that_does_not_come_up_is_told_with_its_reason() -> None:
    from rayllm.cli.bench.startup import one_start

    with pytest.raises(EngineError, match=r"exit code 2; its last output: .*'/nowhere/at/all' does not exist"):
        one_start(["/nowhere/at/all"], 60)
