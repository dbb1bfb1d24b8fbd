import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayllm.cli.main import main


class _Handler(BaseHTTPRequestHandler):
    """Echoes prompts; the first try of `busy` is refused for overload, `bad` always. What stands in `statuses` is
    answered so."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    statuses: dict[str, int]
    lock: threading.Lock
    num_open: int
    most_open: int

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {})

    def do_POST(self) -> None:
        kind = type(self)
        prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        with kind.lock:
            kind.asked.append(prompt)
            kind.num_open += 1
            kind.most_open = max(kind.most_open, kind.num_open)
            tries = kind.asked.count(prompt)
        threading.Event().wait(0.02)
        with kind.lock:
            kind.num_open -= 1
        if prompt in kind.statuses:
            self._send(kind.statuses[prompt], {"error": {"message": "not now"}})
        elif prompt == "bad":
            self._send(400, {"error": {"message": "no such thing"}})
        elif prompt == "busy" and tries == 1:
            self._send(429, {"error": {"message": "later"}}, {"retry-after": "0"})
        else:
            self._send(200, {"echo": prompt, "usage": {"completion_tokens": 1}}, {"x-request-id": f"id-{prompt!a}"})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[tuple[type[_Handler], str]]:
    state = {"asked": [], "statuses": {}, "lock": threading.Lock(), "num_open": 0, "most_open": 0}
    handler = type("_OneHandler", (_Handler,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def line(custom_id: str, prompt: str, **changes: Any) -> str:
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
    return json.dumps({**request, **changes}) + "\n"


def batch(url: str, folder: Path, *flags: str) -> int:
    return main(["run-batch", "-i", str(folder / "in"), "-o", str(folder / "out"), "--url", url, *flags])


def outputs(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "out").read_text().split("\n") if line]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_every_line_is_answered_in_openais_form(server: tuple[type[_Handler], str], tmp_path: Path) -> None:
    (tmp_path / "in").write_text(line("a", "one") + "\n" + line("b", "busy"))
    assert batch(server[1], tmp_path) == 0
    found = outputs(tmp_path)
    assert found["a"]["response"] == {
        "status_code": 200,
        "request_id": "id-'one'",
        "body": {"echo": "one", "usage": {"completion_tokens": 1}},
    }
    assert found["a"]["error"] is None
    assert found["a"]["id"].startswith("batch_req_")
    assert found["b"]["response"]["status_code"] == 200
    assert server[0].asked.count("busy") == 2


def test_a_line_ends_at_its_newline_only(server: tuple[type[_Handler], str], tmp_path: Path) -> None:
    (tmp_path / "in").write_text(line("a", "x").replace('"x"', '"one\u2028two"'))
    assert batch(server[1], tmp_path) == 0
    assert outputs(tmp_path)["a"]["response"]["body"]["echo"] == "one\u2028two"


def test_a_line_that_fails_says_so_and_the_others_go_on(
    server: tuple[type[_Handler], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line("a", "bad"), "{torn\n", line("c", "x", url="completions"), line("d", "x", body=3), line("e", "five")]
    (tmp_path / "in").write_text("".join(lines))
    assert batch(server[1], tmp_path) == 1
    found = outputs(tmp_path)
    assert found["a"]["response"]["body"]["error"]["message"] == "no such thing"
    assert "line 2 is not JSON" in found["line-2"]["error"]["message"]
    assert "must be a path" in found["c"]["error"]["message"]
    assert "must be a JSON object" in found["d"]["error"]["message"]
    assert found["e"]["response"]["status_code"] == 200
    assert "5 lines: 1 answered, 4 failed" in capsys.readouterr().out


def test_a_run_that_was_broken_off_goes_on(server: tuple[type[_Handler], str], tmp_path: Path) -> None:
    (tmp_path / "in").write_text("".join(line(str(number), f"p{number}") for number in range(4)))
    batch(server[1], tmp_path)
    kept = (tmp_path / "out").read_text().splitlines(keepends=True)
    (tmp_path / "out").write_text("".join(kept[:2]) + kept[2][:20])
    server[0].asked.clear()
    assert batch(server[1], tmp_path) == 0
    assert len(server[0].asked) == 2
    assert set(outputs(tmp_path)) == {"0", "1", "2", "3"}
    server[0].asked.clear()
    assert batch(server[1], tmp_path) == 0
    assert server[0].asked == []


def test_what_failed_for_want_of_a_server_is_asked_again_and_replaced(
    server: tuple[type[_Handler], str], tmp_path: Path
) -> None:
    handler, url = server
    handler.statuses = {"p0": 500, "p1": 404, "p2": 401}
    (tmp_path / "in").write_text("".join(line(str(number), f"p{number}") for number in range(4)))
    assert batch(url, tmp_path) == 1
    refused = {"id": "batch_req_0", "custom_id": "gone", "response": None, "error": {"code": "connection_error"}}
    with (tmp_path / "out").open("a") as out:
        out.write(json.dumps(refused) + "\n")
    with (tmp_path / "in").open("a") as lines:
        lines.write(line("gone", "p4"))
    before = outputs(tmp_path)

    handler.asked.clear()
    handler.statuses = {"p2": 502}
    assert batch(url, tmp_path) == 1  # one of them fails again
    found = outputs(tmp_path)  # each id once
    assert sorted(handler.asked) == ["p0", "p2", "p4"]
    assert {number: (found[number]["response"] or {}).get("status_code") for number in found} == {
        "0": 200, "1": 404, "2": 502, "3": 200, "gone": 200,
    }  # fmt: skip
    assert (found["1"], found["3"]) == (before["1"], before["3"])
    assert [entry.name for entry in tmp_path.iterdir() if entry.name not in ("in", "out")] == []


def test_of_two_lines_with_one_id_the_last_counts(server: tuple[type[_Handler], str], tmp_path: Path) -> None:
    """A run that was broken off before it dropped what it had replaced."""
    handler, url = server
    (tmp_path / "in").write_text(line("a", "one") + line("b", "two"))
    assert batch(url, tmp_path) == 0
    answered = (tmp_path / "out").read_text()
    failed = json.dumps({"id": "batch_req_0", "custom_id": "a", "response": {"status_code": 503}, "error": None}) + "\n"
    for content, asked in ((failed + answered, []), (answered + failed, ["one"])):
        handler.asked.clear()
        (tmp_path / "out").write_text(content)
        assert batch(url, tmp_path) == 0
        assert handler.asked == asked
        assert outputs(tmp_path)["a"]["response"]["status_code"] == 200


def test_open_requests_are_bounded(server: tuple[type[_Handler], str], tmp_path: Path) -> None:
    (tmp_path / "in").write_text("".join(line(str(number), f"p{number}") for number in range(12)))
    assert batch(server[1], tmp_path, "--max-concurrency", "3") == 0
    assert server[0].most_open == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "holds no requests"), (line("a", "x") + line("a", "y"), "custom_id 'a' appears twice")],
)
def test_a_file_that_cannot_be_run_is_a_usage_error(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text(text)
    assert batch("http://127.0.0.1:1", tmp_path) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("text", ["my thesis\n", "my thesis", '{"custom_id": "a"}\nmine'])
def test_a_file_that_is_no_output_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text(line("a", "x"))
    (tmp_path / "out").write_text(text)
    assert batch("http://127.0.0.1:1", tmp_path) == 2
    assert "is not an output file of run-batch" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == text


def test_the_input_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines have ids too, and must not count as answered."""
    (tmp_path / "in").write_text(line("a", "x"))
    assert main(["run-batch", "-i", f"{tmp_path}/in", "-o", f"{tmp_path}/in", "--url", "http://127.0.0.1:1"]) == 2
    assert "is not an output file of run-batch" in capsys.readouterr().err


def test_neither_a_folder_nor_a_pipe_is_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text(line("a", "x"))
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path, tmp_path / "pipe"):
        assert main(["run-batch", "-i", f"{tmp_path}/in", "-o", str(output), "--url", "http://127.0.0.1:1"]) == 2
        assert "is not a readable and writable file" in capsys.readouterr().err


def test_no_server_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text(line("a", "x"))
    assert batch("http://127.0.0.1:1", tmp_path) == 3
    assert not (tmp_path / "out").exists()
