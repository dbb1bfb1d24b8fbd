"""`rayllm COMMAND SUBCOMMAND`: dispatch, the list of subcommands, and an unknown one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rayllm.cli.flags import UsageError
from rayllm.cli.subcommands import run_subcommand

SUBCOMMANDS = {"show": ("a_module_for_show", "Show it."), "validate": ("a_module_for_validate", "Check it.")}


def test_the_module_runs_with_the_rest_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    module = SimpleNamespace(run=lambda argv: calls.append(argv) or 3)
    monkeypatch.setitem(sys.modules, "a_module_for_show", module)
    assert run_subcommand("config", SUBCOMMANDS, ["show", "--json"]) == 3
    assert calls == [["--json"]]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_without_a_subcommand_all_are_listed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_subcommand("config", SUBCOMMANDS, argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: rayllm config SUBCOMMAND")
    assert "  show      Show it.\n  validate  Check it.\n" in shown


def test_an_unknown_subcommand_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no 'rayllm config shwo'.*show.*\(known: show, validate\)"):
        run_subcommand("config", SUBCOMMANDS, ["shwo"])
