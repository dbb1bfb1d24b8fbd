"""Without a key: who asks is known by Host, Origin and Sec-Fetch-Site. With one, all of them are free."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serve.served import KEY, Served, completion

PAGE = "https://page.example"
HERE = "127.0.0.1:8000"
_TYPES = {"content-type": "application/json"}


def served(**options: Any) -> Served:
    return Served(**{"allowed_hosts": ("127.0.0.1",), **options})


async def ask(served: Served, method: str = "GET", path: str = "/v1/models", **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in {"host": HERE, **headers}.items()}
    async with served.client() as client:
        json = completion() if method == "POST" else None
        return await client.request(method, path, headers=sent, json=json)


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1:8000", True),
        ("127.0.0.1", True),
        ("10.1.2.3:80", True),
        ("[::1]:8000", True),
        ("[fe80::1]", True),
        ("localhost", True),
        ("LocalHost:8000", True),
        ("localhost.:8000", True),
        ("models.lan:8000", True),
        ("MODELS.lan", True),
        ("a.b.example.com", True),
        ("example.com", False),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("models.lan.evil.example", False),
        ("evilexample.com", False),
        ("evil.example@127.0.0.1", False),
        ("x/health?", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/health"), ("GET", "/")])
async def test_a_server_without_a_key_answers_to_its_own_names(
    host: str, is_known: bool, method: str, path: str
) -> None:
    answer = await ask(served(allowed_hosts=("models.lan", "*.example.com")), method, path, host=host)

    assert answer.status_code == (200 if is_known else 403)
    if not is_known:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in answer.json()["error"]["message"]


async def test_any_host_is_known_where_that_is_said_and_where_a_key_is_asked() -> None:
    assert (await ask(served(allowed_hosts=("*",)), host="evil.example")).status_code == 200
    keyed = served(api_keys=(KEY,))
    answer = await ask(keyed, host="evil.example", origin=PAGE, authorization=f"Bearer {KEY}")
    assert answer.status_code == 200


@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:8001", "http://localhost:8000", "", "x"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/"), ("OPTIONS", "/v1/models")],
)
async def test_a_page_of_another_origin_may_ask_for_nothing(origin: str, method: str, path: str) -> None:
    page = served()
    answer = await ask(page, method, path, origin=origin)

    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "--allowed-origins" in answer.json()["error"]["message"]
    assert not page.engine.streams


async def test_the_files_of_the_pages_are_for_everybody() -> None:
    for path in ("/", "/dashboard", "/pages/chat.js"):
        assert (await ask(served(), "GET", path, origin=PAGE)).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("models.lan", "http://models.lan"),
        ("models.lan", "https://models.lan"),
        ("models.lan:443", "https://models.lan"),
        ("models.lan:80", "http://models.lan"),
    ],
)
async def test_our_own_pages_may_ask_under_every_name_of_the_server(host: str, origin: str) -> None:
    answer = await ask(served(allowed_hosts=("models.lan",)), "POST", "/v1/completions", host=host, origin=origin)
    assert answer.status_code == 200


@pytest.mark.parametrize("allowed", [PAGE, "https://PAGE.example/", "*"])
async def test_an_origin_that_is_named_may_ask_and_reads_the_answer(allowed: str) -> None:
    page = served(allowed_origins=(allowed,))
    question = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    private = {"access_control_request_private_network": "true"}
    preflight = await ask(page, "OPTIONS", "/v1/completions", origin=PAGE, **question, **private)
    answer = await ask(page, "POST", "/v1/completions", origin=PAGE)

    assert preflight.status_code == answer.status_code == 200
    for response in (preflight, answer):
        assert response.headers["access-control-allow-origin"] in (PAGE, "*")
    assert preflight.headers["access-control-allow-private-network"] == "true"


async def test_a_browser_that_asks_for_another_origin_hears_no_in_the_envelope() -> None:
    question = {"access_control_request_method": "POST"}
    answer = await ask(served(allowed_origins=(PAGE,)), "OPTIONS", "/v1/completions", origin="null", **question)

    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    assert "--allowed-origins" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "navigate", 200),
        ("same-origin", "cors", 200),
        ("none", "navigate", 200),
    ],
)
async def test_a_picture_of_another_page_is_refused_and_a_link_is_not(site: str, mode: str, status: int) -> None:
    assert (await ask(served(), sec_fetch_site=site, sec_fetch_mode=mode)).status_code == status
