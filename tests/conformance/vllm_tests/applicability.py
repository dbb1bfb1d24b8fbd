"""Which of vLLM's tests say nothing about a server like this one, and why. All others must pass."""

from __future__ import annotations

_LORA = "asks for a LoRA adapter, which this engine has none of"
_KNOWS = "judges what a pretrained model says"
_CALLS = "needs a model that was trained to call tools when it may"
_TRANSFER = "hands KV cache from one server to another"
_WORDS = "asserts the words of vLLM's own error"
_LAST_CHUNK = "wants text in the chunk that has the finish_reason; OpenAI's has none"
_OWN = "a test of vLLM's own code, not of a server"
_MODEL = "names no model, which OpenAI's chats and completions refuse"

_REASONS: dict[str, str] = {
    "-lora]:": _LORA,
    "test_models.py::test_check_models": _LORA,
    # chats
    "test_chat.py::test_more_than_one_prompt_logprobs_chat": "needs a model that foresees its prompt's words",
    "test_chat.py::test_chat_streaming": _LAST_CHUNK,
    "test_chat.py::test_chat_completion_stream_options": _LAST_CHUNK,
    "test_enable_force_include_usage.py": _LAST_CHUNK,
    "test_chat.py::test_structured_outputs_choice_chat:": _KNOWS,
    "test_chat.py::test_single_chat_session": "counts the tokens of Zephyr's own tokenizer",
    "test_chat.py::test_complex_message_content": _KNOWS,
    "test_chat.py::test_response_format_json_object": _KNOWS,
    "test_chat.py::test_response_format_json_schema": _KNOWS,
    "test_chat.py::test_long_seed": _WORDS,
    "test_chat.py::test_extra_fields_allowed": "sends an unknown field in a message, which is refused here by name",
    "test_chat.py::test_custom_role": "sends a role that OpenAI does not know, which is refused here by name",
    "test_kv_transfer_prompt_token_ids": _TRANSFER,
    "test_return_token_ids.py::test_chat_completion_with_tool_use": _CALLS,
    "test_chat_completion_with_emoji_and_token_ids": "needs a model whose greedy answer ends within 50 tokens",
    "test_function_tool_use[True-auto": _CALLS,
    "test_function_tool_use[False-auto": _CALLS,
    "watermarked": "needs a server with --watermark-config",
    "test_no_args_tool_call": _CALLS,
    # completions
    "test_prompt_validation.py::test_empty_prompt": _WORDS,
    "test_prompt_validation.py::test_out_of_vocab_token_ids": _WORDS,
    "test_completion.py::test_parallel_streaming": _LAST_CHUNK,
    "test_load_prompt_embeds": _OWN,
    "test_disable_prompt_embeds": _OWN,
    # responses
    "test_basic.py::test_simple_input": _KNOWS,
    "test_basic.py::test_instructions": _KNOWS,
    "responses/test_basic.py::test_chat:": _KNOWS,
    "responses/test_structured_output.py": _KNOWS,
    "test_stateful.py::test_previous_response_id": _KNOWS,
    "test_stateful.py::test_two_responses_with_same_prev_id": _KNOWS,
    "test_stateful.py::test_store": _WORDS,
    "test_stateful.py::test_background_error": _WORDS,
    "test_stateful.py::test_cancel_completed": _WORDS,
    "test_simple.py::test_enable_response_messages": "asks for the raw messages of the prompt, an experiment of vLLM's",
    "test_function_calling_with_streaming_expected_arguments": _CALLS,
    "test_messages.py::test_anthropic_streaming_cache_usage": "wants writes to a cache counted without cache_control",
    "test_messages.py::test_anthropic_tool_call:": _CALLS,
    # the server's own pages
    "instrumentator/test_basic.py::test_server_load": _MODEL,
}
"""A part of a test's id, which ends with a colon, and why it is not applicable."""


def reason_against(test_id: str) -> str | None:
    """Why that test is not applicable; None where it is."""
    return next((reason for part, reason in _REASONS.items() if part in f"{test_id}:"), None)
