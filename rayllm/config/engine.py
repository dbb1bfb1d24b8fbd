"""How one model is served, as a user says it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from rayllm.compatibility import CompatibilitySettings
from rayllm.config.base import BaseConfig
from rayllm.config.generation import generation_fields_text, json_object_text
from rayllm.layout import ParallelLayout
from rayllm.request import DEFAULT_MAX_LOGPROBS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["ray", "inproc"]
ModelImpl = Literal["auto", "native", "transformers"]
AttentionBackendName = Literal["auto", "triton", "flash-attn", "flashinfer", "gathered"]
CudaGraphs = Literal["auto", "full", "off"]
LoadFormat = Literal["auto", "safetensors", "pt", "dummy"]
Standby = Literal["off", "process", "weights"]
ContentFormat = Literal["auto", "string", "openai"]
ToolCallParser = Literal[
    "auto",
    "hermes",
    "llama3_json",
    "mistral",
    "mistral_v11",
    "glm4",
    "glm45",
    "deepseek_v3",
    "deepseek_v31",
    "qwen3_coder",
    "granite",
    "kimi_k2",
    "llama4_pythonic",
    "pythonic",
    "openai",
]
ReasoningParser = Literal["auto", "none", "qwen3", "deepseek_r1", "glm45", "mistral", "granite", "openai_gptoss"]

DEFAULT_ENGINE_NAME = "default"
RAY_NAMESPACE = "rayllm"


class EngineConfig(BaseConfig, CompatibilitySettings):
    """How one model is served: field names are vLLM's where the meaning is the same."""

    model: str = Field(
        "",
        description="Folder of a checkpoint (config.json, *.safetensors), or its name at the Hugging Face hub "
        "(owner/model) or ModelScope (ms:owner/model); empty: the built-in model.",
    )
    tokenizer: str | None = Field(None, description="Tokenizer folder, if it is not the model's.")
    served_model_name: str | tuple[str, ...] | None = Field(
        None,
        description="Model names that clients may use; responses show the first. Default: the folder's name.",
    )
    skip_tokenizer_init: bool = Field(
        False, description="Load no tokenizer: prompts are token ids, and outputs have token ids and no text."
    )
    name: str = Field(DEFAULT_ENGINE_NAME, description="Name of the engine, as in get_engine(name).")
    dtype: Dtype = Field("auto", description="Data type of weights and activations; auto: the checkpoint's.")
    device: Device = Field("auto", description="auto: CUDA if there is a GPU, else the CPU.")
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="Workers that share each layer.")
    enable_expert_parallel: bool = Field(
        False,
        description="Of a mixture of experts, give each worker whole experts instead of a share of each.",
    )
    distributed_executor_backend: Backend | None = Field(
        None, description="ray: worker actors; inproc: one worker in this process. Default: ray if needed."
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Context length in tokens; default: auto, the longest that the model has and that fits.",
    )
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Maximum number of sequences that run at once.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Maximum number of tokens per step; default: 2048 on CPU, 8192 on GPU."
    )
    max_queued_requests: int | None = Field(
        1024, ge=1, description="Maximum number of waiting sequences; more are refused. LLM: no limit."
    )
    max_queued_tokens: int | None = Field(
        2**20, ge=1, description="Maximum number of waiting prompt tokens; more are refused. LLM: no limit."
    )
    block_size: int | None = Field(None, description="Tokens per KV block; default: 8 on CPU, 64 on GPU.")
    num_kv_blocks: int | None = Field(
        None, ge=2, description="KV blocks per worker; default: as many as memory allows."
    )
    gpu_memory_utilization: float = Field(0.92, gt=0, le=1, description="Fraction of GPU memory the engine may use.")
    kv_cache_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Bytes of KV cache per worker; default: from gpu_memory_utilization, or a fraction of CPU memory.",
    )
    attention_backend: AttentionBackendName = Field(
        "auto",
        description="What computes attention: triton (RayLLM's kernels), flash-attn or flashinfer (those for prompts, "
        "by a library that is installed), gathered (torch; the only one of a CPU), or auto (the fastest usable).",
    )
    enforce_eager: bool = Field(False, description="Use no CUDA graphs, as --cuda-graphs off.")
    cuda_graphs: CudaGraphs = Field(
        "auto",
        description="When CUDA graphs of steps are captured: auto (when a size of step comes the second time), full "
        "(all at start and in a recovery, which take longer), or off (never: each step launches its kernels one by "
        "one).",
    )
    max_cudagraph_capture_size: int | None = Field(
        None,
        ge=1,
        description="Maximum number of sequences whose decode steps use CUDA graphs (of several numbers, the largest); "
        "default: max_num_seqs.",
    )
    enable_prefix_caching: bool = Field(True, description="Share KV blocks between requests with equal prefixes.")
    load_format: LoadFormat = Field(
        "auto", description="auto: safetensors, else PyTorch files (pt, also called bin); dummy: random weights."
    )
    hf_overrides: str | None = Field(
        None,
        description="JSON object in place of fields of the model's config.json; objects in it are merged: "
        "'{\"rope_theta\": 1e6}'.",
    )
    model_impl: ModelImpl = Field(
        "auto",
        description="What computes the model: native (RayLLM's decoder), transformers (its class in transformers, with "
        "RayLLM's attention: slower), or auto (native where there is one).",
    )
    standby: Standby = Field(
        "off",
        description="A spare worker that replaces a failed one: process (started, libraries imported), or weights "
        "(CPU only: every rank's weights loaded too, a second copy of the model in memory).",
    )
    driver_wait_s: float = Field(
        60.0, gt=0, description="Seconds a request waits for a new driver after the driver is lost."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log format: text, or one JSON object per line.")
    log_file: str | None = Field(
        None,
        description="File that every process appends its log to. Default for serve: a new file, whose path is shown.",
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        description="URL that OpenTelemetry traces are sent to, as http://HOST:4318/v1/traces. Default: no traces.",
    )
    generation_config: str = Field(
        "auto",
        description="Where sampling defaults come from: auto (the model's generation_config.json), vllm (none), or a "
        "folder that holds one.",
    )
    override_generation_config: str | None = Field(
        None,
        description="Sampling defaults as a JSON object, over those of --generation-config: '{\"temperature\": 0.5}'. "
        "max_new_tokens is also the most that a request gets.",
    )
    seed: int = Field(0, ge=0, description="Seeds dummy weights, and requests that bring no seed of their own (LLM).")
    revision: str | None = Field(None, description="Branch, tag or commit of a model that is named by its hub's name.")
    download_dir: str | None = Field(None, description="Folder for downloaded models; default: the hub's cache.")
    chat_template: str | None = Field(
        None, description="File with a Jinja chat template to use in place of the model's."
    )
    chat_template_content_format: ContentFormat = Field(
        "auto",
        description="How the chat template takes contents: string, or openai (a list of parts); auto: found by trying.",
    )
    trust_request_chat_template: bool = Field(
        False, description="Let requests bring a chat template of their own: for trusted clients only, it is a program."
    )
    tool_call_parser: ToolCallParser = Field(
        "auto", description="Format of the model's tool calls; auto: from its chat template."
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="Markers around the model's reasoning; auto: from its chat template; none: everything is text.",
    )
    max_logprobs: int = Field(
        DEFAULT_MAX_LOGPROBS,
        ge=-1,
        description="Maximum number of log-probabilities per position; -1: the whole vocabulary.",
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Show tokens in log-probabilities as 'token_id:N', since two tokens may have the same text."
    )
    enable_force_include_usage: bool = Field(
        False, description="Include usage in every chunk of every stream, whether requested or not."
    )
    enable_per_request_metrics: bool = Field(False, description="Add the metrics of its request to each response.")
    enable_tokenizer_info_endpoint: bool = Field(
        False, description="Serve the tokenizer's settings and chat template at /tokenizer_info."
    )
    enable_auto_tool_choice: bool = Field(
        True, description="Let the model decide whether to call tools; off: only required and named calls are made."
    )

    @field_validator("block_size")
    @classmethod
    def _block_size_is_a_power_of_two(cls, value: int | None) -> int | None:
        if value is not None and (value < 1 or value > 256 or value & (value - 1)):
            raise ValueError("block_size must be a power of two from 1 to 256")
        return value

    @field_validator("override_generation_config", mode="before")
    @classmethod
    def _override_is_an_object_of_known_fields(cls, value: Any) -> Any:
        return None if value is None else generation_fields_text(value)

    @field_validator("model_impl", mode="before")
    @classmethod
    def _native_has_vllms_name(cls, value: Any) -> Any:
        return "native" if value == "vllm" else value

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _backends_have_vllms_names(cls, value: Any) -> Any:
        """`FLASH_ATTN`, `FLASHINFER`, `TRITON_ATTN`."""
        name = value.lower().replace("_", "-") if isinstance(value, str) else value
        return "triton" if name == "triton-attn" else name

    @field_validator("hf_overrides", mode="before")
    @classmethod
    def _config_fields_are_an_object(cls, value: Any) -> Any:
        if callable(value):
            raise ValueError("a function cannot be sent to the processes of an engine: give an object of fields")
        return None if value is None else json_object_text(value, '{"rope_theta": 1e6}')

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _traces_can_be_sent(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("traces are sent by OTLP over HTTP: give the collector's URL, http://HOST:4318/v1/traces")
        if not _has_opentelemetry():
            raise ValueError("OpenTelemetry is not installed: pip install 'rayllm[otel]'")
        return value

    @field_validator("log_file")
    @classmethod
    def _log_file_is_one_for_all_processes(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @field_validator("cuda_graphs")
    @classmethod
    def _eager_steps_have_no_graphs(cls, value: CudaGraphs, info: ValidationInfo) -> CudaGraphs:
        if value == "full" and info.data.get("enforce_eager"):
            raise ValueError("enforce_eager asks for no CUDA graphs: give one of the two")
        return "off" if info.data.get("enforce_eager") else value

    @field_validator("max_cudagraph_capture_size", mode="before")
    @classmethod
    def _of_several_sizes_the_largest_counts(cls, value: Any) -> Any:
        """vLLM's `cudagraph_capture_sizes`: a list, also as text with spaces or commas."""
        sizes = re.findall(r"\w+", value) if isinstance(value, str) else value
        if isinstance(sizes, (list, tuple)) and sizes and all(str(size).isdecimal() for size in sizes):
            return max(map(int, sizes))
        return value

    @field_validator("standby", "cuda_graphs", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value

    @field_validator("served_model_name")
    @classmethod
    def _served_names_are_words(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (value,) if isinstance(value, str) else value or ()
        if value is not None and (not names or not all(names)):
            raise ValueError("a name of the served model is empty: give names of at least one character")
        if len(set(names)) < len(names):
            raise ValueError("served_model_name holds a name twice: give each name once")
        return value

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The fields of `hf_overrides`."""
        return dict(json.loads(self.hf_overrides or "{}"))

    @property
    def layout(self) -> ParallelLayout:
        """How ranks share the model."""
        return ParallelLayout(
            tp=self.tensor_parallel_size,
            pp=self.pipeline_parallel_size,
            expert_parallel=self.enable_expert_parallel,
        )

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """The names that were given, if any."""
        name = self.served_model_name
        return (name,) if isinstance(name, str) else name or ()

    @field_validator("name")
    @classmethod
    def _name_is_a_word(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "._-" for c in value):
            raise ValueError("an engine's name is made of letters, digits, '.', '_' and '-'")
        return value


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:
        return False
