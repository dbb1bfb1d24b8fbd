"""A server without a tokenizer takes prompts of ids, answers with ids, and refuses text."""

from __future__ import annotations

from typing import Any

import pytest
from api.fake_engine import EOS_ID, FakeEngine, config
from api.streams import chunks_of, whole_of

from rayllm.api.anthropic.messages import open_message
from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.service import ModelService
from rayllm.api.vllm.generate import open_generate
from rayllm.api.vllm.tokens import detokenize, tokenize
from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

IDS = [7, 8, 9]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def bare() -> ModelService:
    resolved = config(engine=EngineConfig(skip_tokenizer_init=True))
    made = ModelService()
    made.set_ready(resolved, Tokenizer.from_config(resolved), FakeEngine(lambda request, choice: [20, 21, EOS_ID]))
    return made


async def test_ids_are_answered_with_ids(bare: ModelService) -> None:
    fields = {"model": "tiny", "prompt": IDS, "return_token_ids": True, "logprobs": 1, "echo": False}

    answer = await whole_of(await open_completion(fields, bare))
    [choice] = answer["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", [20, 21, EOS_ID], "stop")
    assert choice["prompt_token_ids"] == IDS

    chunks = await chunks_of(await open_completion({**fields, "stream": True}, bare))
    told = [entry for chunk in chunks for entry in chunk["choices"]]
    assert [i for entry in told for i in entry.get("token_ids") or ()] == [20, 21, EOS_ID]
    assert "".join(entry["text"] for entry in told) == ""
    assert (await whole_of(await open_generate({"prompt": IDS}, bare))) == {"text": [""]}


@pytest.mark.parametrize(
    ("opened", "fields"),
    [
        (open_completion, {"prompt": "hello"}),
        (open_completion, {"prompt": ["hello", "you"]}),
        (open_completion, {"prompt": IDS, "stop": ["a"]}),
        (open_completion, {"prompt": IDS, "bad_words": ["a"]}),
        (open_completion, {"prompt": IDS, "guided_regex": "a+"}),
        (open_completion, {"prompt": IDS, "response_format": {"type": "json_object"}}),
        (open_generate, {"prompt": "hello"}),
        (open_chat, {"messages": MESSAGES}),
        (open_message, {"messages": MESSAGES, "max_tokens": 5}),
        (tokenize, {"prompt": "hello"}),
        (tokenize, {"messages": MESSAGES}),
        (detokenize, {"tokens": IDS}),
    ],
)
async def test_text_is_refused_with_the_reason(bare: ModelService, opened: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="skip_tokenizer_init") as caught:
        await opened({"model": "tiny", **fields}, bare)
    assert (caught.value.status, caught.value.code) == (400, "no_tokenizer")
    assert caught.value.param in fields or caught.value.param == "structured_outputs"
