"""The connection to a server's Ray that all who use an engine in this process share, with Ray's own part faked."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from rayllm.errors import EngineUnreachableError
from rayllm.executor import ray_join
from rayllm.executor.ray_join import SharedRay

ADDRESS, OTHER = "10.0.0.1:6379", "10.0.0.2:6379"


class _Ray:
    """What is asked of Ray, in order; `is_connected` follows."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_connected = False
        self.settings: dict[str, str | None] = {}
        self.refusal: Exception | None = None

    def init(self, address: str) -> None:
        self.calls.append(f"init {address}")
        self.settings = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        if self.refusal is not None:
            raise self.refusal
        self.is_connected = True

    def disconnect(self) -> None:
        self.calls.append("disconnect")
        self.is_connected = False


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> _Ray:
    ray = _Ray()
    for name, value in {
        "_init": ray.init,
        "disconnect": ray.disconnect,
        "ray_is_initialized": lambda: ray.is_connected,
        "_check_answers": lambda address, token: None,
        "prepare_environment": lambda own_cluster: None,
        "read_environment_again": lambda also_token: None,
        "check_working_folder": lambda: None,
    }.items():
        monkeypatch.setattr(ray_join, name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "before")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return ray


def test_the_connection_is_made_once_and_ends_with_the_last_who_holds_it(fake_ray: _Ray) -> None:
    shared = SharedRay()
    assert not shared.is_held
    leave, leave_too = shared.join(ADDRESS, ""), shared.join(ADDRESS, "")
    leave()
    leave()
    assert shared.is_held
    assert fake_ray.calls == [f"init {ADDRESS}"]
    leave_too()
    assert not shared.is_held
    assert fake_ray.calls == [f"init {ADDRESS}", "disconnect"]
    leave = shared.join(OTHER, "")
    assert fake_ray.calls[2:] == [f"init {OTHER}"]
    leave()


def test_another_ray_is_refused_while_one_is_held(fake_ray: _Ray) -> None:
    shared = SharedRay()
    leave = shared.join(ADDRESS, "")
    with pytest.raises(
        EngineUnreachableError, match=rf"at {ADDRESS}.*close that engine before one in the Ray at {OTHER}"
    ):
        shared.join(OTHER, "")
    assert fake_ray.calls == [f"init {ADDRESS}"]
    leave()
    assert not shared.is_held


def test_a_connection_that_was_lost_is_made_again(fake_ray: _Ray) -> None:
    shared = SharedRay()
    leave_lost = shared.join(ADDRESS, "secret")
    fake_ray.is_connected = False
    assert not shared.is_held
    leave = shared.join(OTHER, "")
    assert fake_ray.calls[-1] == f"init {OTHER}"
    leave_lost()
    assert shared.is_held
    leave()
    assert fake_ray.calls[-1] == "disconnect"
    assert (os.environ["RAY_AUTH_MODE"], os.environ.get("RAY_AUTH_TOKEN")) == ("before", None)


@pytest.mark.parametrize(("token", "mode"), [("secret", "token"), ("", "disabled")])
def test_the_token_is_in_the_environment_while_connected_alone(fake_ray: _Ray, token: str, mode: str) -> None:
    shared = SharedRay()
    leave = shared.join(ADDRESS, token)
    assert fake_ray.settings == {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token or None}
    leave()
    assert (os.environ["RAY_AUTH_MODE"], os.environ.get("RAY_AUTH_TOKEN")) == ("before", None)


def test_a_connection_that_fails_leaves_nothing_behind(fake_ray: _Ray) -> None:
    fake_ray.refusal = EngineUnreachableError("no")
    shared = SharedRay()
    with pytest.raises(EngineUnreachableError, match="no"):
        shared.join(ADDRESS, "secret")
    assert (os.environ["RAY_AUTH_MODE"], os.environ.get("RAY_AUTH_TOKEN")) == ("before", None)
    assert fake_ray.calls == [f"init {ADDRESS}", "disconnect"]
    fake_ray.refusal = None
    leave = shared.join(OTHER, "")
    assert shared.is_held
    leave()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "refuses this process's token: .*RAY_AUTH_TOKEN"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, r"does not answer \(timed out\)"),
        (grpc.StatusCode.UNAVAILABLE, r"does not answer \(nothing listens there\)"),
        (None, None),
    ],
)
def test_a_ray_that_does_not_answer_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode | None, message: str | None
) -> None:
    class Refusal(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> Any:
            return code

    class Channel:
        def __enter__(self) -> Any:
            return SimpleNamespace(unary_unary=lambda method: self.ask)

        def __exit__(self, *_: object) -> None: ...

        def ask(self, request: bytes, timeout: float, metadata: Any) -> bytes:
            shown.extend(metadata)
            if code is not None:
                raise Refusal
            return b""

    shown: list[Any] = []
    monkeypatch.setattr(grpc, "insecure_channel", lambda address, options: Channel())
    if message is None:
        ray_join._check_answers(ADDRESS, "")
        assert shown == []
    else:
        with pytest.raises(EngineUnreachableError, match=rf"the Ray at {ADDRESS} {message}"):
            ray_join._check_answers(ADDRESS, "secret")
        assert shown == [("authorization", "Bearer secret")]
