"""How a server of this machine is found; `ps`, `status`, `logs` and `stop` on real processes are in tests/cli."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.machine import registry
from rayllm.machine.registry import Entry, Listing, find, find_at, find_named, listed, running


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "rayllm"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def _listed(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch | None = None, *, pid: int = 0, name: str = "default", **more: Any
) -> Listing:
    """A server of this process, or one that has another pid and lives."""
    if monkeypatch is not None:
        monkeypatch.setattr(Entry, "is_alive", lambda entry: True)
        monkeypatch.setattr(registry, "this_process", lambda: registry.Process(pid, 1))
    given = {"model": "m", "url": f"http://127.0.0.1:{9000 + pid}", "log": Path("/log"), "shutdown_timeout_s": 1.0}
    return stack.enter_context(listed("serve", name=name, **{**given, **more}))


def test_servers_get_names_of_their_own(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [_listed(stack, monkeypatch, pid=pid, name_is_given=False).entry.name for pid in (1, 2, 3)]
    assert names == ["default", "default-2", "default-3"]
    assert [find(name).pid for name in names] == [1, 2, 3]


def test_a_given_name_that_is_taken_is_refused_with_who_has_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    _listed(stack, monkeypatch, pid=1, name="mine")
    with pytest.raises(ConfigError, match=r"name='mine' is taken by the server at http://127.0.0.1:9001 \(pid 1\)"):
        _listed(stack, monkeypatch, pid=2, name="mine")
    assert [entry.pid for entry in running()] == [1]


def test_servers_that_start_at_one_moment_get_names_of_their_own(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Entry, "is_alive", lambda entry: True)
    pids = iter(range(1, 100))
    monkeypatch.setattr(registry, "this_process", lambda: registry.Process(next(pids), 1))
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: _listed(stack, name_is_given=False).entry.name, range(8)))
    assert len(set(names)) == 8


@pytest.mark.parametrize(
    "word",
    [
        "default",
        "9007",
        ":9007",
        "7",
        "m",
        "127.0.0.1:9007",
        "localhost:9007",
        "http://127.0.0.1:9007",
        "http://127.0.0.1:9007/",
        "http://localhost:9007/v1",
        "http://0.0.0.0:9007/v1/",
        None,
    ],
)
def test_a_server_is_found_by_name_port_pid_model_or_any_form_of_its_address(
    word: str | None, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    _listed(stack, monkeypatch, pid=7)
    assert find(word).pid == 7


def test_a_name_goes_before_a_port_and_a_port_before_a_pid(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    _listed(stack, monkeypatch, pid=1, name="9002")
    _listed(stack, monkeypatch, pid=2)
    _listed(stack, monkeypatch, pid=9001, name="third")
    assert find("9002").pid == 1
    assert find("9001").pid == 1
    assert find("2").pid == 2


def test_what_is_not_found_or_not_one_is_an_error_that_names_all(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for look in (find, find_named):
        with pytest.raises(EngineUnreachableError, match="you have no running server on this machine: start one with"):
            look(None)
    _listed(stack, monkeypatch, pid=1, name="one")
    _listed(stack, monkeypatch, pid=2, name="two")
    for look in (find, find_named):
        with pytest.raises(
            ConfigError, match=r"2 servers are running, name one of them: 'one': pid 1, .*'two': pid 2, "
        ):
            look(None)
    with pytest.raises(ConfigError, match="2 servers are running, name one"):
        find("m")
    with pytest.raises(
        EngineUnreachableError, match=r"no server named 'twoo' is running here; did you mean 'two'\? \('one'"
    ):
        find_named("twoo")
    with pytest.raises(EngineUnreachableError, match=r"no server 'http://10.0.0.1:9001' is running here"):
        find("http://10.0.0.1:9001")
    assert find_at("http://localhost:9002") == find("two")
    assert find_at("9003") is None


def test_the_ray_of_a_server_is_listed_and_its_token_shown_to_nobody_else(stack: ExitStack, folder: Path) -> None:
    listing = _listed(stack)
    assert find(None).ray_address == ""
    listing.note_ray("127.0.0.1:6379", "secret")
    assert (find(None).ray_address, find(None).ray_token) == ("127.0.0.1:6379", "secret")
    assert "secret" not in json.dumps(find(None).shown())
    [file] = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_entry_of_an_older_version_is_read_and_one_that_is_no_entry_goes(stack: ExitStack, folder: Path) -> None:
    _listed(stack)
    [file] = folder.iterdir()
    entry = json.loads(file.read_text())
    del entry["ray_address"], entry["ray_token"]
    file.write_text(json.dumps({**entry, "of_a_newer_version": 1}))
    assert find(None).ray_address == ""
    file.write_text('{"pid": 1}')
    assert running() == []
    assert list(folder.iterdir()) == []


def test_a_running_server_of_another_version_is_not_listed_and_its_file_stays(stack: ExitStack, folder: Path) -> None:
    path = folder / f"{_listed(stack).entry.pid}.json"
    content = json.loads(path.read_text())
    other = {name: value for name, value in content.items() if name != "model"}
    path.write_text(json.dumps(other))
    assert running() == []
    assert path.exists()
    path.write_text(json.dumps({**other, "started": other["started"] + 1}))
    assert running() == []
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_an_error_with_the_fix(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry.tempfile, "mkstemp", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\): make room, or set XDG_RUN"):
        _listed(stack)
