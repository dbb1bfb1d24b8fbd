"""The fields of requests. Unknown ones are errors that name the nearest; `null` always means "not given".

Three lists decide what happens to a name: the models below (implemented), `WITHOUT_EFFECT` (OpenAI's,
accepted and unused), and `NOT_SUPPORTED` (refused unless the value asks for nothing).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, FiniteFloat, ValidationError, WithJsonSchema

from rayllm.errors import RequestError, did_you_mean, shorten
from rayllm.prompt.fields import ChatFields, Objects, list_of_objects, request_error_of

MAX_PROMPTS = 2048
MAX_CHOICES_IN_ALL = 4096
MAX_STOP_CHARACTERS = 1024
MAX_BAD_WORD_CHARACTERS = 16 * 1024
"""Of all words together: each is tokenized twice."""
MAX_TOKEN_ID_LIST = 1024
MAX_LOGIT_BIASES = 1024
MAX_CACHE_SALT_CHARACTERS = 1024

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        # vLLM's
        "session_id",
        "guided_decoding_backend",
        "return_token_offsets",
        "mm_payload",
        "return_mm_kwargs",
    }
)
"""OpenAI's fields about accounts, storage, billing and speed, and vLLM's for routing and its render endpoints: there is
nothing here for them to change."""

NOT_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "is for chats: completions call nothing"),
    "tool_choice": (("none",), "is for chats: completions call nothing"),
    "parallel_tool_calls": ((True, False), "is for chats"),
    "functions": (([],), "is not supported; OpenAI replaced it by tools"),
    "function_call": (("none",), "is not supported; OpenAI replaced it by tools and tool_choice"),
    "reasoning_effort": (("none",), "is for chats"),
    "verbosity": (("medium",), "is for chats"),
    "modalities": ((["text"],), "can only be ['text']: this server writes text"),
    "audio": ((), "is not supported: this server writes text"),
    "web_search_options": ((), "is not supported"),
    "moderation": ((), "is not supported"),
    "suffix": (("",), "is not supported: the model has no infill"),
    "prompt_embeds": ((), "is not supported; send text or token ids"),
    "logits_processors": ((), "is not supported: requests run no code"),
    "chat_template": ((), "is for chats"),
    "spaces_between_special_tokens": ((True,), "can only be true"),
    "include_reasoning": ((True,), "is for chats"),
    "return_prompt_text": ((False,), "is for chats"),
    "documents": (([],), "is for chats"),
    "thinking_token_budget": ((), "is not supported"),
    "watermarking": ((False,), "is not supported"),
    "return_weight_versions": ((False,), "is not supported: this server's weights do not change"),
    "routed_experts_prompt_start": ((0,), "is not supported: no routed experts are returned"),
    "request_id": ((), "is not supported; send the header x-request-id"),
    "repetition_detection": ((), "is not supported; see repetition_penalty and frequency_penalty"),
    "stream_interval": ((1,), "can only be 1: every step of the engine is sent as it comes"),
    "kv_transfer_params": (({},), "is not supported: this server hands no KV cache on"),
    "ec_transfer_params": (({},), "is not supported: this server hands no encoder cache on"),
    "vllm_xargs": (({},), "is not supported: this server has no extensions that read it"),
    "media_io_kwargs": (({},), "is not supported: this server reads text"),
    "mm_processor_kwargs": (({},), "is not supported: this server reads text"),
}
"""Name: the values that ask for nothing (besides null), and why others are refused."""


_TOP_LEVEL = ": give its fields at the top level of the body"
_ELSEWHERE = {
    "extra_body": f"{_TOP_LEVEL} (only the openai client's own calls have extra_body)",
    "sampling_params": _TOP_LEVEL,
    "parameters": _TOP_LEVEL,
    "options": _TOP_LEVEL,
    "enable_thinking": ": give chat_template_kwargs={'enable_thinking': ...}",
    "thinking": ": give chat_template_kwargs={'enable_thinking': ...}, or reasoning_effort",
    "num_predict": "; did you mean 'max_tokens'?",
    "do_sample": ": give temperature=0 for greedy answers",
    "num_beams": ": give use_beam_search=true with n",
    "guided_whitespace_pattern": ": give structured_outputs with disable_any_whitespace",
}
"""Fields of other engines, and fields at a wrong place: what says the same here."""


class Body(BaseModel):
    """A request's body; what it does with names that are no fields of it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    not_supported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = NOT_SUPPORTED


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding of chunks; without effect."""


def _stop_strings(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise ValueError("Input should be text or a list of texts")


def _texts(value: Any) -> Any:
    if value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return value
    raise ValueError("Input should be a list of texts")


def _token_ids(value: Any) -> Any:
    if value is None or (isinstance(value, list) and all(type(token_id) is int for token_id in value)):
        return value
    raise ValueError("Input should be a list of integers")


def _text_or_objects(value: Any) -> Any:
    return value if isinstance(value, str) else list_of_objects(value)


_STRING, _NULL = {"type": "string"}, {"type": "null"}
_OBJECTS = {"type": "array", "items": {"type": "object"}}

# Checked by hand: pydantic would collect an error for each entry of a long list.
StopStrings = Annotated[
    Any,
    AfterValidator(_stop_strings),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING}, _NULL]}),
]
TokenIds = Annotated[
    Any,
    AfterValidator(_token_ids),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "integer"}}, _NULL]}),
]
Texts = Annotated[Any, AfterValidator(_texts), WithJsonSchema({"anyOf": [{"type": "array", "items": _STRING}, _NULL]})]
TextOrObjects = Annotated[Any, AfterValidator(_text_or_objects), WithJsonSchema({"anyOf": [_STRING, _OBJECTS, _NULL]})]


class SamplingFields(Body):
    """What every shape of a chat takes under the same names; null is the chat's default."""

    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    seed: int | None = None
    stop_token_ids: TokenIds = None
    bad_words: Texts = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    priority: int | None = None
    timeout: FiniteFloat | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def sampling_fields(self) -> dict[str, Any]:
        """These fields, as a chat's body has them."""
        return {name: getattr(self, name) for name in SamplingFields.model_fields}


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
AnyPrompt = Annotated[
    Any,
    WithJsonSchema({"anyOf": [_STRING, _IDS, {"type": "array", "items": {"anyOf": [_STRING, _IDS]}, "minItems": 1}]}),
]


class GenerationBody(Body):
    """What completions and chats have in common. Ranges are checked by `SamplingParams`."""

    model: str
    n: int | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    seed: int | None = None
    stop: StopStrings = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    max_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    # vLLM's
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | bool | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Texts = None
    guided_grammar: str | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    stop_token_ids: TokenIds = None
    bad_words: Texts = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    """Where `truncate_prompt_tokens` cuts; left keeps the last tokens."""
    prompt_logprobs: int | None = None
    logprob_token_ids: TokenIds = None
    use_beam_search: bool | None = None
    length_penalty: FiniteFloat | None = None
    return_tokens_as_token_ids: bool | None = None
    allowed_token_ids: TokenIds = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    timeout: FiniteFloat | None = None
    """Seconds from the request's arrival until it is ended; the header `x-request-timeout` says the same."""
    cache_salt: str | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    prompt: AnyPrompt
    """Text, token ids, or a list of either; read by `completions`."""
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class GenerateBody(GenerationBody):
    """vLLM's demo server knows one model, which need not be named."""

    model: str | None = None  # type: ignore[assignment]
    prompt: Annotated[Any, WithJsonSchema({"anyOf": [_STRING, _IDS]})]
    """Text or token ids."""


class ChatBody(ChatFields, GenerationBody):
    max_completion_tokens: int | None = None
    """OpenAI's newer name for `max_tokens`, which it overrides."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # vLLM's
    echo: bool | None = None
    """The answer begins with the message that it continues."""
    include_reasoning: bool | None = None
    return_prompt_text: bool | None = None


class TokensBody(Body):
    """Nothing is generated here, so that there is nothing to take without effect."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    not_supported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}


class TokenizeBody(TokensBody):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects = None
    return_token_strs: bool | None = None


class DetokenizeBody(TokensBody):
    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


_B = TypeVar("_B", bound=Body)


def read_body(fields: dict[str, Any], model: type[_B]) -> _B:
    """The checked body. Raises `RequestError` that names the field at fault."""
    known = model.model_fields
    implemented: dict[str, Any] = {}
    for name, value in fields.items():
        if name in known:
            implemented[name] = value
        elif name in model.not_supported:
            _check_neutral(name, value, *model.not_supported[name])
        elif name not in model.without_effect:
            shown = name[:100]
            near = _ELSEWHERE.get(name) or did_you_mean(shown, [*known, *model.without_effect, *model.not_supported])
            raise RequestError(f"unknown field {shown!r}{near}", param=shown, code="unknown_parameter")
    try:
        return model(**implemented)
    except ValidationError as error:
        raise request_error_of(error) from None


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...], reason: str) -> None:
    if value is not None and not any(type(value) is type(known) and value == known for known in neutral):
        raise RequestError(f"{name} {reason}, got {shorten(value)}", param=name, code="unsupported_parameter")


def check_names(where: str, value: Mapping[str, Any], known: Iterable[str], param: str) -> None:
    """Refuses names that are none of the known. With null they are not given: clients send their objects back whole."""
    for name, given in value.items():
        if name not in known and given is not None:
            raise RequestError(
                f"{where}: unknown field {shorten(name)}{did_you_mean(name[:100], known)}",
                param=param,
                code="unknown_parameter",
            )
