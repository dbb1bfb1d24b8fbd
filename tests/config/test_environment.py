from __future__ import annotations

import pytest

from rayllm.config import Environment


def test_secrets_are_hidden_where_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLM_API_KEY", "secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RLLM_LOG_DIR", "/logs")
    given = Environment.given()
    assert given["RLLM_LOG_DIR"] == "/logs"
    assert "secret" not in given.values()
    assert (given["RLLM_API_KEY"], Environment.api_key()) == ("(hidden)", "secret")


@pytest.mark.parametrize(
    ("value", "address"), [("", None), ("local", None), (" 10.0.0.1:6379 ", "10.0.0.1:6379"), ("auto", "auto")]
)
def test_ray_address_is_a_cluster_to_join_or_none(
    value: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert Environment.ray_address() == address


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("1", True), ("TRUE", True), ("0", False), ("no", False)]
)
def test_ha_proxy_is_on_off_or_not_said(
    value: str | None, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", value)
    assert Environment.ha_proxy() is expected
