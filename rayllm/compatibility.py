"""Settings of other engines, vLLM's above all, that RayLLM takes so that scripts run as they are.

Some have no effect here (`notes` says why, in a line each), some have one value that can be served: any other is an
error that says what RayLLM lacks. Plain Python, below everything else.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

_LACKING: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_parallel_size": ((1,), "RayLLM has no pipeline parallelism yet: use tensor_parallel_size"),
    "data_parallel_size": ((1,), "RayLLM has no replicas of an engine yet: start several servers"),
    "quantization": ((None,), "RayLLM reads no quantized weights yet: give an unquantized checkpoint and leave it out"),
    "kv_cache_dtype": (("auto",), "the KV cache always has the model's type: leave it out, or give auto"),
    "swap_space": ((None, 0.0), "RayLLM keeps no KV blocks in CPU memory, it computes them again: give 0"),
    "cpu_offload_gb": ((None, 0.0), "RayLLM keeps all weights on the device: give 0, or use tensor_parallel_size"),
    "speculative_config": ((None, {}), "RayLLM has no speculative decoding yet: leave it out"),
    "enable_lora": ((False,), "RayLLM has no LoRA adapters yet: merge the adapter into the weights"),
    "lora_modules": ((None, []), "RayLLM has no LoRA adapters yet: merge the adapter into the weights"),
    "runner": (("auto", "generate"), "RayLLM serves models that generate: give auto or generate"),
    "task": ((None, "auto", "generate"), "RayLLM serves models that generate: give auto or generate"),
    "pooler_config": ((None, {}), "RayLLM serves models that generate: leave it out"),
}
"""Setting: the values that can be served, and what is said of others."""
_TOKENIZER_MODES = {
    "slow": "transformers 5 has one implementation of each tokenizer, the same as without it",
    "mistral": "RayLLM does not use mistral-common: a folder with tokenizer.json is read without it",
    "custom": "RayLLM runs no code of others to read a tokenizer",
}
"""Those of vLLM that are not served, and why."""
_READ_FORMATS = "auto, safetensors, pt (or bin: PyTorch's own files) and dummy"
_UNREAD_FORMATS = {
    **dict.fromkeys(("hf", "npcache"), "auto finds the files that there are"),
    **dict.fromkeys(
        ("fastsafetensors", "runai_streamer", "runai_streamer_sharded", "instanttensor"),
        "safetensors files are read in parallel without it",
    ),
    **dict.fromkeys(("tensorizer", "sharded_state", "gguf", "bitsandbytes", "mistral"), "convert it to safetensors"),
}
"""Values of vLLM's `load_format` that are not served, and what to do instead."""


_OF_A_GPU = {
    "gpu_memory_utilization": "kv_cache_memory_bytes or num_kv_blocks sets the memory for KV",
    "enforce_eager": "CUDA graphs are a GPU's",
    "cuda_graphs": "CUDA graphs are a GPU's",
    "max_cudagraph_capture_size": "CUDA graphs are a GPU's",
}
"""Settings of `EngineConfig` without effect on a CPU, and why."""
_SIZES = ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")
_UNITS = {unit: 1000**power for power, unit in enumerate("kmgt", 1)}
_UNITS |= {unit: 1024**power for power, unit in enumerate("KMGT", 1)}


def _number_of(text: str) -> Any:
    """vLLM's sizes: `2k` is 2000, `2K` is 2048, `1.5m` 1,500,000. Other text stays what it is."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return text
    number = Decimal(found[1]) * _UNITS[found[2]]
    return int(number) if number == int(number) else text


class CompatibilitySettings(BaseModel):
    """Fields of `EngineConfig` that other engines have and RayLLM has no use for, or not yet."""

    trust_remote_code: bool = Field(
        False,
        description="Let workers run the Python code of a checkpoint whose model neither RayLLM nor transformers has. "
        "Without effect for all other models: they are read without it.",
    )
    disable_custom_all_reduce: bool = Field(
        False,
        description="Sum over ranks by NCCL alone, not by RayLLM's kernels over NVLink. No effect on CPU (gloo sums).",
    )
    disable_custom_kernels: bool = Field(False, description="Without effect: each layer has one implementation.")
    enable_chunked_prefill: bool = Field(True, description="Always on.")
    disable_log_stats: bool = Field(False, description="Without effect: use --log-file.")
    pipeline_parallel_size: int = Field(1, description="Only 1.")
    data_parallel_size: int = Field(1, description="Only 1.")
    quantization: str | None = Field(None, description="Not supported yet.")
    kv_cache_dtype: str = Field("auto", description="Only auto: the model's.")
    swap_space: float | None = Field(None, description="GiB of KV in CPU memory; only 0.")
    cpu_offload_gb: float | None = Field(None, description="GiB of weights in CPU memory; only 0.")
    speculative_config: Any = Field(None, description="Not supported yet.")
    enable_lora: bool = Field(False, description="Not supported yet.")
    lora_modules: Any = Field(None, description="Not supported yet.")
    runner: str = Field("auto", description="Only auto or generate.")
    task: str | None = Field(None, description="Only auto or generate.")
    pooler_config: Any = Field(None, description="Not supported yet.")
    tokenizer_mode: str = Field("auto", description="Only auto or hf: tokenizer.json, else what transformers makes.")

    @field_validator("max_model_len", mode="before", check_fields=False)
    @classmethod
    def _default_length_has_other_names(cls, value: Any) -> Any:
        return None if value in ("auto", "-1", -1) else value

    @field_validator(*_SIZES, mode="before", check_fields=False)
    @classmethod
    def _sizes_may_have_a_unit(cls, value: Any) -> Any:
        return _number_of(value) if isinstance(value, str) else value

    @field_validator("speculative_config", "pooler_config", mode="before")
    @classmethod
    def _an_empty_object_may_be_text(cls, value: Any) -> Any:
        return {} if isinstance(value, str) and value.strip() == "{}" else value

    @field_validator("tokenizer_mode")
    @classmethod
    def _tokenizer_can_be_read_so(cls, value: str) -> str:
        if value not in ("auto", "hf"):
            reason = _TOKENIZER_MODES.get(value, "RayLLM finds out how a tokenizer is read")
            raise ValueError(f"{reason}: give auto")
        return value

    @field_validator("load_format", mode="before", check_fields=False)
    @classmethod
    def _weights_can_be_read_so(cls, value: Any) -> Any:
        """`bin` is another name of `pt`."""
        if isinstance(value, str) and value in _UNREAD_FORMATS:
            raise ValueError(f"RayLLM reads {_READ_FORMATS}; {_UNREAD_FORMATS[value]}")
        return "pt" if value == "bin" else value

    @field_validator(*_LACKING)
    @classmethod
    def _can_be_served(cls, value: Any, info: ValidationInfo) -> Any:
        served, reason = _LACKING[str(info.field_name)]
        if value not in served:
            raise ValueError(reason)
        return value

    @field_validator("dtype", mode="before", check_fields=False)
    @classmethod
    def _dtype_has_other_names(cls, value: Any) -> Any:
        """vLLM's short names, and torch's own types."""
        name = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
        return {"half": "float16", "float": "float32"}.get(name, name) if isinstance(name, str) else name


_WITHOUT_EFFECT = {
    "trust_remote_code": "is not needed: RayLLM reads the model's files itself and runs no code from them",
    "disable_custom_kernels": "has no effect: each layer has one implementation",
}


def notes(config: CompatibilitySettings, device: str, *, runs_code: bool = False) -> list[str]:
    """A line for each setting that was given and has no effect on this device (`cpu` or `cuda`). `runs_code`: the model
    is (or may be) a checkpoint's own code."""
    given = config.model_fields_set
    found = [
        f"{name}=True {why}"
        for name, why in _WITHOUT_EFFECT.items()
        if name in given and getattr(config, name) and not (runs_code and name == "trust_remote_code")
    ]
    if "disable_custom_all_reduce" in given and config.disable_custom_all_reduce and device == "cpu":
        found.append("disable_custom_all_reduce=True has no effect on CPU: gloo sums over ranks")
    if "enable_chunked_prefill" in given and not config.enable_chunked_prefill:
        found.append("enable_chunked_prefill=False has no effect: prompts are always computed within the token budget")
    if device == "cpu":
        found += [f"{name} has no effect on CPU: {why}" for name, why in _OF_A_GPU.items() if name in given]
    return found
