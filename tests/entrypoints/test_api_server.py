"""vLLM's module names for the server run `rayllm serve`."""

from __future__ import annotations

import runpy
import sys

import pytest

from rayllm.cli import main as command_line
from rayllm.entrypoints.openai import api_server


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were run; each ends with exit code 3."""
    run: list[list[str]] = []

    def fake_main(argv: list[str]) -> int:
        run.append(argv)
        return 3

    monkeypatch.setattr(command_line, "main", fake_main)
    monkeypatch.setattr(api_server, "command_line", fake_main)
    return run


def test_main_serves_with_its_arguments(calls: list[list[str]]) -> None:
    assert api_server.main(["--model", "m"]) == 3
    assert api_server.main([]) == 3
    assert calls == [["serve", "--model", "m"], ["serve"]]


@pytest.mark.parametrize("module", ["rayllm.entrypoints.openai.api_server", "rayllm.entrypoints.api_server"])
def test_the_module_serves_with_the_command_line(
    module: str, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["api_server.py", "--port", "0"])
    # `run_module` warns about a module that is imported already, and the demo server needs the other's `main`.
    if module == api_server.__name__:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 3
    assert calls == [["serve", "--port", "0"]]
