"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from rayllm.api.offload import offload
from rayllm.api.protocol import DetokenizeBody, TokenizeBody, read_body
from rayllm.api.service import ModelService, ServedModel
from rayllm.errors import RequestError, shorten
from rayllm.prompt.chat import render
from rayllm.prompt.fields import ChatFields


async def tokenize(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    """Ids of a prompt, or of messages as a chat would be sent to the model."""
    body = await offload(read_body, fields, TokenizeBody)
    model = service.named(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give prompt or messages, one of them", param="prompt")
    token_ids = await asyncio.to_thread(_tokenize, body, model)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.config.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(lambda: list(map(model.tokenizer.piece, token_ids)))
    return answer


def _tokenize(body: TokenizeBody, model: ServedModel) -> list[int]:
    if body.messages is not None:
        fields = ChatFields(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template=body.chat_template,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
        )
        text = render(fields, model)
        return model.tokenize_chat(text, add_special_tokens=bool(body.add_special_tokens))
    text = body.prompt or ""
    return model.tokenize(text, add_special_tokens=body.add_special_tokens is not False, param="prompt")


async def detokenize(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    """The text of ids, special tokens too."""
    body = await offload(read_body, fields, DetokenizeBody)
    model = service.named(body.model)
    model.tokenizer.require_text("/detokenize", "tokens")
    return {"prompt": await asyncio.to_thread(_detokenize, body.tokens, model)}


def _detokenize(token_ids: list[int], model: ServedModel) -> str:
    for token_id in token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"tokens: {shorten(token_id)} is out of vocabulary, which has {model.vocab_size} tokens", param="tokens"
            )
    return model.tokenizer.decode(token_ids, False)
