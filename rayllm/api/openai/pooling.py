"""Embeddings, scores, classes: what their bodies may hold. No engine here pools yet, so that each ends at
`ServedModel.require`, which names what the model would need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, WithJsonSchema

from rayllm.api.offload import offload
from rayllm.api.protocol import MAX_PROMPTS, Body, Objects, read_body
from rayllm.api.service import ModelService, ServedModel, Task
from rayllm.errors import RequestError, shorten

MAX_DOCUMENTS = 2048
MAX_DIMENSIONS = 2**16


def _any_input(value: Any) -> Any:
    if value is None or isinstance(value, (str, list)):
        return value
    raise ValueError("Input should be text, token ids, or a list of either")


def _text_or_texts(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return value
    raise ValueError("Input should be text or a list of texts")


_STRING, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
_LISTS = {"type": "array", "items": {"anyOf": [_STRING, {"type": "integer"}, _IDS]}}
AnyInput = Annotated[Any, AfterValidator(_any_input), WithJsonSchema({"anyOf": [_STRING, _LISTS, {"type": "null"}]})]
Texts = Annotated[
    Any,
    AfterValidator(_text_or_texts),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING}]}),
]
Documents = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"anyOf": [_STRING, {"type": "object"}]}, "minItems": 1})
]


class PoolingFields(Body):
    """vLLM's fields of every body here."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"user", "safety_identifier", "metadata"})
    not_supported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}

    model: str
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None


class InputBody(PoolingFields):
    input: AnyInput = None
    messages: Objects = None
    add_generation_prompt: bool | None = None


class EmbeddingsBody(InputBody):
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None


class PoolingBody(EmbeddingsBody):
    task: Literal["embed", "classify", "token_embed", "token_classify"] | None = None


class ClassifyBody(InputBody):
    use_activation: bool | None = None


class ScoreBody(PoolingFields):
    text_1: Texts
    text_2: Texts


class RerankBody(PoolingFields):
    """Jina's and Cohere's fields."""

    query: str
    documents: Documents
    top_n: int | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = None
    max_chunks_per_doc: int | None = None
    rank_fields: Annotated[list[str] | None, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "null"}]})] = None


async def embeddings(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    return await offload(_refused, fields, service, EmbeddingsBody, "embed", _check_input, _check_dimensions)


async def pooling(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    return await offload(_refused, fields, service, PoolingBody, "pool", _check_input, _check_dimensions)


async def classify(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    return await offload(_refused, fields, service, ClassifyBody, "classify", _check_input)


async def score(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    return await offload(_refused, fields, service, ScoreBody, "score", _check_pairs)


async def rerank(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    return await offload(_refused, fields, service, RerankBody, "score", _check_documents)


def _refused(
    fields: dict[str, Any],
    service: ModelService,
    kind: type[PoolingFields],
    task: Task,
    *checks: Callable[[Any, ServedModel], None],
) -> dict[str, Any]:
    """Checks a body whole, then says what the model lacks."""
    body = read_body(fields, kind)
    model = service.named(body.model)
    limit = body.truncate_prompt_tokens
    if limit is not None and limit != -1 and not 1 <= limit <= model.config.max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens={shorten(limit)} is outside [1, {model.config.max_model_len}]",
            param="truncate_prompt_tokens",
        )
    for check in checks:
        check(body, model)
    model.require(task)
    raise RequestError(f"nothing here can {task} yet", code="unsupported_model", param="model")


def _check_input(body: InputBody, model: ServedModel) -> None:
    if (body.input is None) == (body.messages is None):
        raise RequestError("give input or messages, one of them", param="input")
    if isinstance(body.input, str):
        _check_text(body.input)
    elif body.input is not None:
        _check_inputs(body.input, model)


def _check_inputs(given: Sequence[Any], model: ServedModel) -> None:
    """A list of texts, the token ids of one, or lists of those of many."""
    if not given:
        raise RequestError("input is empty: give at least one text", param="input")
    if all(type(token_id) is int for token_id in given):
        _check_ids(given, model)
        return
    if len(given) > MAX_PROMPTS:
        raise RequestError(f"input holds {len(given)} texts, at most {MAX_PROMPTS} are allowed", param="input")
    are_texts = isinstance(given[0], str)
    for entry in given:
        if are_texts and isinstance(entry, str):
            _check_text(entry)
        elif not are_texts and isinstance(entry, list) and entry and all(type(inner) is int for inner in entry):
            _check_ids(entry, model)
        else:
            raise RequestError(
                f"input must be text, token ids, or a list of either, got {shorten(entry)} in it", param="input"
            )


def _check_text(text: str) -> None:
    if not text:
        raise RequestError("input must not be an empty text", param="input")


def _check_ids(ids: Sequence[int], model: ServedModel) -> None:
    for token_id in ids:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"input: {shorten(token_id)} is out of vocabulary, which has {model.vocab_size} tokens", param="input"
            )


def _check_dimensions(body: EmbeddingsBody, model: ServedModel) -> None:
    if body.dimensions is not None and not 1 <= body.dimensions <= MAX_DIMENSIONS:
        raise RequestError(
            f"dimensions={shorten(body.dimensions)} is outside [1, {MAX_DIMENSIONS}]", param="dimensions"
        )


def _check_pairs(body: ScoreBody, model: ServedModel) -> None:
    counts = []
    for name in ("text_1", "text_2"):
        texts = getattr(body, name)
        texts = [texts] if isinstance(texts, str) else texts
        counts.append(len(texts))
        if not 1 <= len(texts) <= MAX_DOCUMENTS:
            raise RequestError(f"{name} holds {len(texts)} texts, 1 to {MAX_DOCUMENTS} are allowed", param=name)
    if counts[0] not in (1, counts[1]):
        raise RequestError(
            f"text_1 holds {counts[0]} texts and text_2 {counts[1]}: give one text_1, or as many of both",
            param="text_2",
        )


def _check_documents(body: RerankBody, model: ServedModel) -> None:
    documents = body.documents
    if not isinstance(documents, list) or not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise RequestError(
            f"documents must be a list of 1 to {MAX_DOCUMENTS} texts, got {shorten(documents)}", param="documents"
        )
    for i, document in enumerate(documents):
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise RequestError(
                f"documents[{i}] must be text or an object with a text, got {shorten(document)}", param="documents"
            )
    for name in ("top_n", "max_tokens_per_doc", "max_chunks_per_doc"):
        value = getattr(body, name)
        if value is not None and value < 1:
            raise RequestError(f"{name}={shorten(value)} must be at least 1", param=name)
