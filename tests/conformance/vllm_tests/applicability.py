"""Which of vLLM's tests are not applicable to a server like this one, and which it answers otherwise on purpose. All
others must pass."""

from __future__ import annotations

_LORA = "asks for a LoRA adapter, which this engine does not have"
_KNOWS = "judges what a pretrained model says"
_CALLS = "needs a model that was trained to call tools when it may"
_TRANSFER = "hands KV cache from one server to another"
_EMBEDS = "a test of vLLM's own code: it reads prompt embeddings, which this engine does not take"
_ORCA = "asks for ORCA's load headers, which this server does not send"

_NOT_APPLICABLE: dict[str, str] = {
    "-lora]:": _LORA,
    "test_models.py::test_check_models": _LORA,
    # chats
    "test_chat.py::test_more_than_one_prompt_logprobs_chat": "needs a model that foresees its prompt's words",
    "test_chat.py::test_structured_outputs_choice_chat:": _KNOWS,
    "test_chat.py::test_single_chat_session": "counts the tokens of Zephyr's own tokenizer",
    "test_chat.py::test_complex_message_content": _KNOWS,
    "test_chat.py::test_response_format_json_object": _KNOWS,
    "test_chat.py::test_response_format_json_schema": _KNOWS,
    "test_chat.py::test_long_seed": "asserts the name that pydantic gives to an error, which is no part of the API",
    "test_kv_transfer_prompt_token_ids": _TRANSFER,
    "test_return_token_ids.py::test_chat_completion_with_tool_use": _CALLS,
    "test_function_tool_use[plain-True-auto": _CALLS,
    "test_function_tool_use[plain-False-auto": _CALLS,
    "test_function_tool_use[auto": _CALLS,
    "test_function_calling_with_streaming_forced_tool_choice[auto": _CALLS,
    "test_function_calling_with_streaming_expected_arguments": _CALLS,
    "test_no_args_tool_call": _CALLS,
    "watermarked": "needs a server with --watermark-config",
    # completions
    "test_prompt_validation.py::test_empty_prompt": "asks for prompt embeddings, which this engine does not take",
    "test_load_prompt_embeds": _EMBEDS,
    "test_disable_prompt_embeds": _EMBEDS,
    # responses and messages
    "test_basic.py::test_simple_input": _KNOWS,
    "test_basic.py::test_instructions": _KNOWS,
    "responses/test_basic.py::test_chat:": _KNOWS,
    "responses/test_structured_output.py": _KNOWS,
    "test_stateful.py::test_background:": (
        "needs the whole answer within the first second: until its end the status is in_progress, as OpenAI's is"
    ),
    "test_stateful.py::test_previous_response_id": _KNOWS,
    "test_stateful.py::test_two_responses_with_same_prev_id": _KNOWS,
    "test_messages.py::test_anthropic_tool_call:": _CALLS,
    # the server's own routes
    "test_orca_metrics.py": _ORCA,
}
"""A part of a test's id, which ends with a colon, and why it is not applicable."""

_DIFFERENT: dict[str, str] = {
    "test_chat.py::test_chat_streaming": (
        "wants text in the chunk that has the finish_reason: OpenAI's has none, unless every chunk has usage"
    ),
    "test_messages.py::test_anthropic_streaming_cache_usage": (
        "wants cache writes counted: Anthropic's API counts them for requests with cache_control only"
    ),
    "instrumentator/test_basic.py::test_server_load": (
        "names no model: completions refuse that, as OpenAI's do, so that a request never reaches the wrong model"
    ),
}
"""The same of tests that must fail, and what is different."""


def reason_against(test_id: str) -> str | None:
    """Why that test is not applicable; None where it is."""
    return _found(_NOT_APPLICABLE, test_id)


def difference(test_id: str) -> str | None:
    """What that test wants and this server does otherwise on purpose; None for most."""
    return _found(_DIFFERENT, test_id)


def _found(reasons: dict[str, str], test_id: str) -> str | None:
    return next((reason for part, reason in reasons.items() if part in f"{test_id}:"), None)
