from __future__ import annotations

import pytest

from rayllm.compatibility import CompatibilitySettings
from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import ConfigError


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'max_model_length'; did you mean 'max_model_len'\?"):
        EngineConfig.parse({"max_model_length": 5})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_num_seqs": 0}, ["max_num_seqs=0", "greater than or equal to 1"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization=1.5"]),
        ({"dtype": "int3"}, ["dtype='int3'", "bfloat16"]),
        (
            {"enforce_eager": True, "cuda_graphs": "full"},
            ["cuda_graphs='full'", "enforce_eager asks for no"],
        ),
        ({"block_size": 24}, ["block_size=24", "power of two"]),
        ({"name": "a/b"}, ["name='a/b'", "letters"]),
    ],
)
def test_a_bad_value_is_one_line_with_the_limit(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.parse(settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_eager_steps_have_no_graphs() -> None:
    assert EngineConfig(enforce_eager=True).cuda_graphs == "off"
    assert EngineConfig.parse({"cuda_graphs": False}).cuda_graphs == "off"
    assert EngineConfig().cuda_graphs == "auto"


def test_attention_backends_may_have_vllms_names() -> None:
    names = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "gathered")
    found = [EngineConfig.parse({"attention_backend": name}).attention_backend for name in names]
    assert found == ["flash-attn", "flashinfer", "triton", "gathered"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EngineConfig().max_num_seqs = 3  # type: ignore[misc]


def test_the_fields_of_the_config_are_frozen_in_a_list() -> None:
    assert sorted(EngineConfig.model_fields.keys() - CompatibilitySettings.model_fields.keys()) == [
        "attention_backend",
        "block_size",
        "chat_template",
        "chat_template_content_format",
        "cuda_graphs",
        "device",
        "distributed_executor_backend",
        "download_dir",
        "driver_wait_s",
        "dtype",
        "enable_auto_tool_choice",
        "enable_expert_parallel",
        "enable_force_include_usage",
        "enable_per_request_metrics",
        "enable_prefix_caching",
        "enable_tokenizer_info_endpoint",
        "enforce_eager",
        "generation_config",
        "gpu_memory_utilization",
        "hf_overrides",
        "kv_cache_memory_bytes",
        "load_format",
        "log_file",
        "log_format",
        "max_cudagraph_capture_size",
        "max_logprobs",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_queued_requests",
        "max_queued_tokens",
        "model",
        "model_impl",
        "name",
        "num_kv_blocks",
        "otlp_traces_endpoint",
        "override_generation_config",
        "reasoning_parser",
        "return_tokens_as_token_ids",
        "revision",
        "seed",
        "served_model_name",
        "skip_tokenizer_init",
        "standby",
        "tensor_parallel_size",
        "tokenizer",
        "tool_call_parser",
        "trust_request_chat_template",
    ]
    assert not set(EngineConfig.model_fields) & set(ServerConfig.model_fields)
