"""The fields of a chat that decide its prompt: those of `/v1/chat/completions`, and the options of `LLM.chat`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, ValidationError, WithJsonSchema

from rayllm.errors import RequestError, shorten


def list_of_objects(value: Any) -> Any:
    if value is None or (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        return value
    raise ValueError("Input should be a list of objects")


# Checked by hand: pydantic would collect an error for each entry of a long list.
Objects = Annotated[
    Any,
    AfterValidator(list_of_objects),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]}),
]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatFields(BaseModel):
    """Null is the default of each."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: Annotated[list[dict[str, Any]], FailFast()]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    documents: Objects = None


def chat_fields(**fields: Any) -> ChatFields:
    """Raises `RequestError` for a field of the wrong type."""
    try:
        return ChatFields(**fields)
    except ValidationError as error:
        raise request_error_of(error) from None


def request_error_of(error: ValidationError) -> RequestError:
    """The first field at fault, in words: every way in which it could have been right."""
    faults = error.errors(include_url=False, include_context=False)
    param = str(faults[0]["loc"][0]) if faults[0]["loc"] else None
    if faults[0]["type"] == "missing":
        return RequestError(f"{param} is required", param=param)
    same = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    reasons = list(dict.fromkeys(fault["msg"].removeprefix("Value error, ") for fault in same))
    return RequestError(f"{param or 'body'}: {' or '.join(reasons[:3])}, got {shorten(same[0]['input'])}", param=param)
