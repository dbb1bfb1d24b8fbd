from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from serve.served import Served

from rayllm.config import ServerConfig
from rayllm.errors import ConfigError
from rayllm.serve import haproxy
from rayllm.serve.haproxy import haproxy_binary, proxy_environment

needs_haproxy = pytest.mark.skipif(haproxy_binary() is None, reason="Ray brings HAProxy on Linux alone")
SERVER = ServerConfig(http_proxy="haproxy")


@pytest.fixture(scope="module")
def serves_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Serve itself writes for one application with one replica."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    folder = tmp_path_factory.mktemp("serve")
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        is_head=True,
        has_received_routes=True,
    )
    api = HAProxyApi(cfg=config, config_file_path=str(folder / "haproxy.cfg"))
    replica = ServerConfig(name="replica", host="127.0.0.1", port=30000)
    backend = BackendConfig(name="http-app", path_prefix="/", app_name="app", servers=[replica])
    api.set_backend_configs({"http-app": backend})
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@needs_haproxy
def test_haproxy_takes_serves_configuration_as_it_is_mended(serves_config: str, tmp_path: Path) -> None:
    command = proxy_environment(SERVER, str(tmp_path))["RAY_SERVE_HAPROXY_BINARY_PATH"]
    path = tmp_path / "haproxy.cfg"
    path.write_text(serves_config)
    checked = subprocess.run([command, "-c", "-dR", "-f", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    config = path.read_text()
    assert re.findall(r"bind (\S+)", serves_config) != ["127.0.0.1:8000"]
    assert re.findall(r"bind (\S+)", config) == ["127.0.0.1:8000"]
    assert "use_backend http-app" in config
    assert "server replica 127.0.0.1:30000" in config
    assert "500.http" not in {Path(line.split()[-1]).parent.name for line in config.splitlines() if "errorfile" in line}


@needs_haproxy
def test_serves_own_paths_are_closed_and_ids_of_any_length_dropped(serves_config: str) -> None:
    config = haproxy.haproxy_config.mended(serves_config, "/pages")
    frontend = config.partition("frontend http_frontend")[2].partition("\nbackend ")[0]
    assert [line.split()[3] for line in frontend.splitlines() if "http-request return" in line] == ["404", "404"]
    assert "http-request del-header x-request-id unless" in frontend
    assert "status 400" in config.partition("backend default_backend")[2]
    assert "errorfile 400 /dev/null" in config.partition("backend http-app")[2]  # whoever closes one half hears nothing
    without_app = "frontend http_frontend\n    bind x:1\nbackend default_backend\n    http-request return status 404\n"
    assert "status 503" in haproxy.haproxy_config.mended(without_app, "/pages")


@needs_haproxy
def test_what_haproxy_says_by_itself_is_in_the_envelope(tmp_path: Path) -> None:
    proxy_environment(SERVER, str(tmp_path))
    pages = {int(path.stem): path.read_bytes() for path in (tmp_path / "haproxy").glob("*.http")}
    assert set(pages) == set(haproxy.haproxy_config.PAGES)
    for status, page in pages.items():
        head, _, body = page.partition(b"\r\n\r\n")
        answered = int(head.split()[1])
        assert answered == (status if status < 500 else 503)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert f"Content-Length: {len(body)}".encode() in head
        assert (b"Retry-After" in head) == (answered == 503)


def test_a_proxy_in_python_needs_nothing(tmp_path: Path) -> None:
    python = ServerConfig(http_proxy="python")
    assert proxy_environment(python, str(tmp_path)) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


def test_haproxy_by_name_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.setattr(haproxy, "haproxy_binary", lambda: None)
    with pytest.raises(ConfigError, match="--http-proxy python"):
        proxy_environment(SERVER, str(tmp_path))
    assert proxy_environment(ServerConfig(), str(tmp_path)) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


async def test_the_request_id_is_not_sent_twice_behind_serve() -> None:
    async with Served(sends_request_id=False).client() as client:
        assert "x-request-id" not in (await client.get("/health")).headers
