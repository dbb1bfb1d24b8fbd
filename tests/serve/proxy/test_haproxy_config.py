"""What becomes of the configuration that Serve writes; `test_haproxy` shows that HAProxy takes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayllm.serve.proxy import haproxy_config

WRITTEN = """
global
    log /dev/log local0
    tune.bufsize 32768
defaults
    mode http
    option httplog
    errorfile 500 /serve/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    log global
    acl healthcheck path -i /-/healthz
    acl routes path -i /-/routes
    http-request return status 200 content-type text/plain string "ok" if healthcheck
    http-request return status 200 content-type application/json string "{}" if routes
    use_backend app if { path_beg / }
    default_backend default_backend
backend app
    mode http
    server replica 127.0.0.1:30000
backend default_backend
    http-request return status 404 content-type text/plain string "no"
listen stats
    bind :8404
"""


def _sections(config: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in config.splitlines():
        if line.startswith(" "):
            found[list(found)[-1]].append(line.strip())
        else:
            found[line] = []
    return found


def test_side_ports_are_left_out_and_serves_own_paths_ask_for_a_key() -> None:
    found = _sections(haproxy_config.adjusted(WRITTEN, "/pages"))
    assert not any("prometheus" in title or "stats" in title for title in found)
    frontend = found["frontend http_frontend"]
    assert frontend[0] == "mode tcp"
    assert 'string "ok"' not in " ".join(frontend)
    assert "http-request return status 404 default-errorfiles if routes" in frontend
    assert frontend.index("use_backend refused_request if { var(txn.refused) -m found }") < frontend.index(
        "use_backend app if { path_beg / }"
    )
    assert found["backend refused_request"]


def test_errors_are_our_pages_and_the_script_has_the_buffers_size() -> None:
    found = _sections(haproxy_config.adjusted(WRITTEN, "/pages"))
    errors = [line for line in found["defaults"] if line.startswith("errorfile")]
    assert errors == [f"errorfile {status} /pages/{status}.http" for status in haproxy_config.PAGES]
    assert "option httplog" not in found["defaults"]
    [script] = [line for line in found["global"] if line.startswith("lua-load-per-thread")]
    assert script.endswith(f"'/pages' {32768 - 1024}")
    assert "errorfile 400 /dev/null" in found["backend app"]


@pytest.mark.parametrize(("has_app", "status"), [(True, 404), (False, 503)])
def test_a_path_of_no_application_is_not_found_and_without_one_nothing_is_ready(has_app: bool, status: int) -> None:
    written = WRITTEN if has_app else WRITTEN.replace("    use_backend app if { path_beg / }\n", "")
    lines = _sections(haproxy_config.adjusted(written, "/pages"))["backend default_backend"]
    assert lines[-1] == f"http-request return status {status} default-errorfiles"


def test_the_script_becomes_the_binary_with_the_adjusted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, called = tmp_path / "haproxy.cfg", []
    file.write_text(WRITTEN)
    monkeypatch.setattr(os, "execv", lambda binary, arguments: called.append((binary, arguments)))
    haproxy_config.main(["/bin/haproxy", "/pages", "-db", "-dR", "-f", str(file)])
    assert called == [("/bin/haproxy", ["/bin/haproxy", "-db", "-f", str(file)])]
    assert file.read_text() == haproxy_config.adjusted(WRITTEN, "/pages")
