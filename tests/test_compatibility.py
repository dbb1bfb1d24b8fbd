"""What users of vLLM type is accepted, or refused with the setting, the value and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayllm.compatibility import notes
from rayllm.config import EngineConfig
from rayllm.engine.owner.program import program_config
from rayllm.errors import ConfigError

ACCEPTED: list[dict[str, Any]] = [
    {"tokenizer": None, "max_model_len": 2048, "trust_remote_code": True},
    {"gpu_memory_utilization": 0.9, "max_model_len": 2048, "swap_space": 0, "cpu_offload_gb": 0},
    {"max_num_batched_tokens": 4096, "max_num_seqs": 256},
    {"trust_remote_code": True, "download_dir": "./models"},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "distributed_executor_backend": "ray"},
    {"quantization": None, "kv_cache_dtype": "auto", "enforce_eager": True, "disable_custom_all_reduce": True},
    {"runner": "generate", "task": "auto", "model_impl": "auto", "enable_lora": False},
    {"speculative_config": None, "pooler_config": None, "tokenizer_mode": "hf", "enable_chunked_prefill": True},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=lambda settings: " ".join(settings))
def test_what_the_documents_type_is_accepted(settings: dict[str, Any]) -> None:
    config = program_config("", settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("half", "float16"),
        ("float", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("auto", "auto"),
        (torch.float16, "float16"),
        (torch.float, "float32"),
    ],
)
def test_a_dtype_has_vllms_names_too(given: object, meant: str) -> None:
    assert program_config("", {"dtype": given}).dtype == meant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_space": 4}, "swap_space=4: RayLLM keeps no KV blocks in CPU memory.*give 0"),
        ({"cpu_offload_gb": 2}, "cpu_offload_gb=2: RayLLM keeps all weights on the device: give 0"),
        ({"quantization": "awq"}, "quantization='awq': RayLLM reads no quantized weights yet"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: RayLLM has no pipeline parallelism yet"),
        ({"data_parallel_size": 3}, "data_parallel_size=3: RayLLM has no replicas"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8': the KV cache always has the model's type"),
        ({"enable_lora": True}, "enable_lora=True: RayLLM has no LoRA adapters yet"),
        ({"runner": "pooling"}, "runner='pooling': RayLLM serves models that generate"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode='slow': transformers 5 has one implementation.*give auto"),
        ({"tokenizer_mode": "mistral"}, "tokenizer_mode='mistral': RayLLM does not use mistral-common.*give auto"),
        ({"tokenizer_mode": "new"}, "tokenizer_mode='new': RayLLM finds out how a tokenizer is read: give auto"),
        ({"load_format": "tensorizer"}, "load_format='tensorizer': RayLLM reads auto, .*pt .*; convert it to safetens"),
        ({"load_format": "runai_streamer"}, "load_format='runai_streamer': .*in parallel without it"),
        ({"load_format": "hf"}, "load_format='hf': .*auto finds the files"),
        ({"load_format": "new"}, "load_format='new': Input should be 'auto', 'safetensors', 'pt' or 'dummy'"),
        ({"hf_overrides": "[1]"}, "give a JSON object"),
        ({"hf_overrides": {"a": {1}}}, "give a JSON object, as .*set"),
        ({"hf_overrides": print}, "a function cannot be sent to the processes of an engine: give an object"),
        ({"dtype": "int8"}, "dtype='int8': Input should be 'auto'"),
        ({"dtype": 16}, "dtype=16: Input should be"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        program_config("", settings)
    assert "\n" not in str(caught.value)


def test_pytorchs_own_files_have_two_names() -> None:
    assert program_config("", {"load_format": "bin"}).load_format == "pt"


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'trust_remote_cod'; did you mean 'trust_remote_code'\?"):
        program_config("", {"trust_remote_cod": True})


def test_what_has_no_effect_is_said_once_and_only_where_it_was_given() -> None:
    assert notes(EngineConfig(), "cpu") == []
    assert notes(EngineConfig(trust_remote_code=False, enforce_eager=False), "cuda") == []
    given = EngineConfig(
        trust_remote_code=True, enforce_eager=True, disable_custom_all_reduce=True, gpu_memory_utilization=0.9
    )
    on_cpu = notes(given, "cpu")
    assert len(on_cpu) == 4
    assert "enforce_eager has no effect on CPU: CUDA graphs are a GPU's" in on_cpu
    assert "trust_remote_code=True is not needed" in on_cpu[0]
    assert any("gloo sums over ranks" in line for line in on_cpu)
    assert any("gpu_memory_utilization has no effect on CPU" in line for line in on_cpu)
    on_cuda = notes(given, "cuda")
    assert not any("gpu_memory_utilization" in line or "all_reduce" in line for line in on_cuda)
    assert not any("enforce_eager" in line for line in on_cuda)
