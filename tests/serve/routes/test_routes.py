"""Routes beside chats and completions: vLLM's own, models in two shapes, and those that need other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serve.served import ANSWER, Served

from rayllm.config import EngineConfig
from rayllm.serve.routes.pooling import ROUTES


async def test_generate_answers_and_streams_lines() -> None:
    async with Served().client() as client:
        body = {"prompt": "a", "max_tokens": 100}
        whole = await client.post("/generate", json=body)
        lines = await client.post("/generate", json={**body, "stream": True}, headers={"x-rayllm-resume": "true"})
        events = await client.post("/generate_stream", json=body)

    assert whole.json() == {"text": [f"a{ANSWER}"]}
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert json.loads(lines.text.splitlines()[-1]) == whole.json()
    assert events.headers["content-type"].startswith("text/event-stream")
    assert events.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", sorted(ROUTES))
async def test_a_model_that_cannot_says_what_it_would_need(path: str) -> None:
    body = {"model": "tiny", "input": "a"}
    if "rerank" in path:
        body = {"model": "tiny", "query": "a", "documents": ["b"]}  # type: ignore[dict-item]
    elif "score" in path:
        body = {"model": "tiny", "text_1": "a", "text_2": "b"}
    async with Served().client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_model"


async def test_models_are_told_in_the_shape_of_whoever_asks() -> None:
    async with Served().client() as client:
        ours = (await client.get("/v1/models")).json()
        theirs = (await client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
        one = (await client.get("/v1/models/tiny", headers={"anthropic-version": "2023-06-01"})).json()

    assert ours["data"][0]["permission"][0]["allow_sampling"] is True
    assert theirs == {"data": [one], "first_id": "tiny", "last_id": "tiny", "has_more": False}
    assert (one["type"], one["id"]) == ("model", "tiny")


async def test_a_model_of_several_names_answers_to_each_by_the_first() -> None:
    served = Served()
    served.make_ready(served_model_aliases=("second", "org/third"))
    async with served.client() as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/third")).json()
        answers = [
            await client.post("/v1/completions", json={"model": name, "prompt": "a"})
            for name in ("tiny", "second", "org/third")
        ]
        unknown = await client.post("/v1/completions", json={"model": "fourth", "prompt": "a"})

    assert [card["id"] for card in listed["data"]] == ["tiny", "second", "org/third"]
    assert one["id"] == "org/third"
    assert [answer.json()["model"] for answer in answers] == ["tiny"] * 3
    assert unknown.status_code == 404
    assert "'tiny', 'second', 'org/third'" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("POST", "/v1/responses", {"input": "a"}),
        ("POST", "/v1/embeddings", {"input": "a"}),
        ("POST", "/invocations", {"prompt": "a"}),
        ("GET", "/v1/models/nothing", {}),
    ],
)
async def test_an_unknown_model_is_an_invalid_request(method: str, path: str, body: dict[str, object]) -> None:
    async with Served().client() as client:
        response = await client.request(method, path, json={**body, "model": "nothing"})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "model_not_found")


async def test_invocations_are_answered_by_the_endpoint_that_their_body_is_for() -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with Served().client() as client:
        chat = await client.post("/invocations", json={"model": "tiny", "messages": messages})
        text = await client.post("/invocations", json={"model": "tiny", "prompt": "a", "stream": True})
        vectors = await client.post("/invocations", json={"model": "tiny", "input": "a"})
        nothing = await client.post("/invocations", json={"model": "tiny", "text": "a"})
        ping = await client.post("/ping")

    assert chat.json()["choices"][0]["message"]["content"] == ANSWER
    assert text.text.endswith("data: [DONE]\n\n")
    assert vectors.json()["error"]["code"] == "unsupported_model"
    assert nothing.status_code == 400
    assert "messages (a chat)" in nothing.json()["error"]["message"]
    assert ping.status_code == 200


async def test_the_tokenizers_settings_are_shown_where_the_operator_wants_it(tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>", "special": True},
        "added_tokens_decoder": {"0": {"content": "<s>"}},
        "model_max_length": 10**30,
        "vocab_file": "/somewhere/vocab.json",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    off, on = Served(), Served()
    engine = EngineConfig(enable_tokenizer_info_endpoint=True)
    on.make_ready(engine=engine, tokenizer_path=str(tmp_path))
    async with off.client() as client:
        refused = await client.get("/tokenizer_info")
    async with on.client() as client:
        shown = (await client.get("/tokenizer_info")).json()

    assert refused.status_code == 404
    assert "--enable-tokenizer-info-endpoint" in refused.json()["error"]["message"]
    assert (shown["bos_token"], shown["added_tokens_decoder"], shown["add_bos_token"]) == ("<s>", {"0": "<s>"}, False)
    assert shown["tokenizer_class"]
    assert shown["model_max_length"] >= 2**31
    assert "vocab_file" not in shown
    assert "im_start" in shown["chat_template"]
