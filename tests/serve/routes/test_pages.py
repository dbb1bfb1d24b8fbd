"""How the pages are sent, without a browser."""

from __future__ import annotations

import re

import pytest
from serve.served import KEY, Served

from rayllm.engine.driver.actor import EngineDescription
from rayllm.errors import EngineUnreachableError
from rayllm.executor.worker_process import WorkerPlace
from rayllm.serve.routes.pages import FOLDER, PAGE_PATHS, Deployment


async def test_pages_need_no_key_and_what_they_ask_for_does() -> None:
    async with Served(api_keys=[KEY]).client() as client:
        for path in PAGE_PATHS:
            assert (await client.get(path)).status_code == 200
        for path in ("/dashboard/state", "/metrics", "/v1/models", "/pages/absent.js", "/pages/", "/pages/../app.py"):
            assert (await client.get(path)).status_code == 401


async def test_a_page_says_what_it_is_and_lets_nothing_else_in() -> None:
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    async with Served().client() as client:
        for path in sorted(PAGE_PATHS - {"/", "/dashboard"}):
            page = await client.get(path)
            assert page.headers["content-type"].startswith(types[path[path.rindex(".") :]])
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
            assert "unsafe" not in policy
            assert page.headers["x-content-type-options"] == "nosniff"
        assert (await client.get("/")).content == (FOLDER / "chat.html").read_bytes()
        assert (await client.get("/dashboard")).content == (FOLDER / "dashboard.html").read_bytes()


async def test_a_page_is_sent_again_only_when_it_changed() -> None:
    async with Served().client() as client:
        page = await client.get("/")
        assert page.headers["cache-control"] == "no-cache"
        again = await client.get("/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert (await client.get("/", headers={"if-none-match": '"other"'})).status_code == 200
        head = await client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(page.content))
        assert (await client.post("/")).status_code == 405


def test_the_pages_name_files_that_are_there_and_none_from_elsewhere() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r'(?:src|href)="pages/([^"]+)"', text)) <= names
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= names
        addresses = re.findall(r"https?://[^\s\"'`)]+", text)
        assert [address for address in addresses if "www.w3.org" not in address and "?:\\/" not in address] == []
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|<script>|style=\"", text)


async def test_the_state_tells_what_runs_where() -> None:
    place = WorkerPlace(11, "n" * 56, "10.0.0.1", ("cpu",))
    workers = (WorkerPlace(12, "n" * 56, "10.0.0.1", ("cuda:0",)), WorkerPlace(13, "m" * 56, "10.0.0.2", ("cuda:1",)))

    async def describe() -> Deployment:
        return Deployment(place, EngineDescription("{}", "tiny", 64, place, workers))

    async with Served(describe=describe).client() as client:
        state = (await client.get("/dashboard/state")).json()
    assert (state["ready"], state["stage"], state["model"]["name"]) == (True, "ready", "tiny")
    assert state["engine"] == {"num_blocks": 64}
    assert [(p["role"], p["rank"], p["devices"]) for p in state["processes"]] == [
        ("ingress", None, []),
        ("driver", None, []),
        ("worker", 0, ["cuda:0"]),
        ("worker", 1, ["cuda:1"]),
    ]


@pytest.mark.parametrize("error", [EngineUnreachableError("no engine"), ValueError("unforeseen")])
async def test_the_state_is_told_also_while_the_engine_cannot_be_asked(error: Exception) -> None:
    async def describe() -> Deployment:
        raise error

    async with Served(ready=False, describe=describe).client() as client:
        state = (await client.get("/dashboard/state")).json()
    assert (state["ready"], state["engine"], state["model"]) == (False, None, None)
    assert [process["role"] for process in state["processes"]] == ["ingress"]
