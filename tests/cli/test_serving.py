from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayllm.cli import serve, serving
from rayllm.cli.main import main
from rayllm.cli.serving import check_before_start
from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import EngineError
from rayllm.executor.ray_watch import RayWatch


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("0.0.0.0", (), True),
        ("::", (), True),
        ("0.0.0.0", ("secret",), False),
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("::1", (), False),
    ],
)
def test_a_server_that_all_may_use_is_warned_of(
    host: str, keys: tuple[str, ...], warns: bool, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_before_start(EngineConfig(model=str(llama_path)), ServerConfig(host=host, port=0, api_key=keys))
    err = capsys.readouterr().err
    assert err.startswith("WARNING: listening on " + host) if warns else not err
    assert ("--api-key" in err) == warns


def test_an_engine_that_is_given_up_ends_serve_with_code_1_and_one_line(
    llama_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    def engine_watch() -> Callable[[], None]:
        def raise_if_failed() -> None:
            raise EngineError("worker rank 1 failed: no such disk; node 12ab, host 10.0.0.1, cpu")

        return raise_if_failed

    @contextlib.contextmanager
    def ready_server(*_: Any) -> Iterator[Any]:
        try:
            yield None, SimpleNamespace(engine_watch=engine_watch, ray=RayWatch([]))
        finally:
            left.append("closed")

    monkeypatch.setattr(serving, "foreground_server", ready_server)
    monkeypatch.setattr(serve, "_announce", lambda screen, running: None)
    assert main(["serve", str(llama_path), "--port", "0"]) == 1
    said = "rayllm serve: worker rank 1 failed: no such disk; node 12ab, host 10.0.0.1, cpu\n"
    assert (capsys.readouterr().err, left) == (said, ["closed"])
