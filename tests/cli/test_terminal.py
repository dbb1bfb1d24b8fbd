import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli.on_terminal import OnTerminal

SCRIPT = """
import pathlib, sys
from rayllm.cli.terminal import Screen
from rayllm.observability.logs import setup_logging
setup_logging("text", file=sys.argv[1])
with Screen.open(pathlib.Path(sys.argv[1])) as screen:
    print("chatter of a library", flush=True)
    for stage in ("starting Ray", "loading weights: 1 of 2", "loading weights: 2 of 2"):
        screen.stage(stage)
    if sys.argv[2] == "fail":
        raise ValueError("no")
    screen.box("ready", [("url", "http://127.0.0.1:8000/v1"), ("KV cache", "16 tokens")])
"""


def test_on_a_terminal_each_stage_ends_as_a_ticked_line(tmp_path: Path) -> None:
    with OnTerminal(["-c", SCRIPT, str(tmp_path / "log"), "go"]) as terminal:
        shown = terminal.read_all()
    assert terminal.process.returncode == 0, shown
    assert shown.count("✓ starting Ray") == 1
    assert shown.count("✓ loading weights") == 1
    assert "╭" in shown
    assert "│ url       http://127.0.0.1:8000/v1 │" in shown
    assert "chatter" not in shown
    log = (tmp_path / "log").read_text()
    assert "chatter" in log
    assert "loading weights: 2 of 2" in log
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_chatter_of_libraries_can_be_kept_out_of_the_log(tmp_path: Path) -> None:
    script = SCRIPT.replace("Path(sys.argv[1]))", 'Path(sys.argv[1]), chatter_path=pathlib.Path(sys.argv[1] + ".out"))')
    script = script.replace('"text"', '"json"')
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "log"), "go"], check=True, timeout=60)
    assert "chatter" in (tmp_path / "log.out").read_text()
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event["message"].split(": ", 1)[1] for event in events[:1]] == ["starting Ray"]


def test_a_stage_that_failed_is_crossed(tmp_path: Path) -> None:
    with OnTerminal(["-c", SCRIPT, str(tmp_path / "log"), "fail"]) as terminal:
        shown = terminal.read_all()
    assert "✓ starting Ray" in shown
    assert "✗ loading weights" in shown
    assert "ValueError: no" in shown


def test_a_stage_before_one_that_begins_again_is_crossed_and_stopping_is_not(tmp_path: Path) -> None:
    stages = '("starting Ray", "loading weights", "starting Ray", "stopping")'
    script = SCRIPT.replace('("starting Ray", "loading weights: 1 of 2", "loading weights: 2 of 2")', stages)
    with OnTerminal(["-c", script, str(tmp_path / "log"), "fail"]) as terminal:
        shown = terminal.read_all()
    marks = [line.split()[0] for line in shown.splitlines() if line[:1] in "✓✗" and line]
    assert marks == ["✓", "✗", "✗", "✓"]


def test_a_narrow_terminal_gets_the_values_whole_and_without_a_frame(tmp_path: Path) -> None:
    with OnTerminal(["-c", SCRIPT, str(tmp_path / "log"), "go"], columns=30) as terminal:
        shown = terminal.read_all()
    assert "╭" not in shown
    assert "http://127.0.0.1:8000/v1\n" in shown


@pytest.mark.parametrize("way", ["pipe", "dumb terminal"])
def test_elsewhere_stages_are_plain_lines(way: str, tmp_path: Path) -> None:
    argv = ["-c", SCRIPT, str(tmp_path / "log"), "go"]
    if way == "pipe":
        shown = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60).stdout
    else:
        with OnTerminal(argv, TERM="dumb") as terminal:
            shown = terminal.read_all()
    lines = ["starting Ray ...", "loading weights: 1 of 2 ...", "ready", "url       http://127.0.0.1:8000/v1"]
    assert shown.splitlines() == [*lines, "KV cache  16 tokens"]
