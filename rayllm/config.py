"""One pydantic model for Python, YAML and the command line. Frozen; unknown keys are errors that name the nearest.

`EngineConfig` is what a user says. What follows from it together with the model and the machine is worked out once,
by `engine.resolve`, into a `ResolvedConfig`: nothing is looked up or defaulted after that. Environment variables
are read in this file alone.
"""

from __future__ import annotations

import glob
import importlib.util
import ipaddress
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rayllm.compatibility import CompatibilitySettings
from rayllm.errors import ConfigError, did_you_mean
from rayllm.layout import ParallelLayout
from rayllm.request import DEFAULT_MAX_LOGPROBS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["ray", "inproc"]
LoadFormat = Literal["auto", "safetensors", "pt", "dummy"]
HttpProxy = Literal["auto", "haproxy", "python"]
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


def _unknown_setting(name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")


class _Config(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=False, defer_build=True
    )  # built at the first use: a typo on the command line is answered before

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Any:
        """Builds the config from plain settings; every fault becomes one `ConfigError` line with the mend."""
        unknown = [name for name in settings if name not in cls.model_fields]
        if unknown:
            raise _unknown_setting(unknown[0], cls.model_fields)
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "config"
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}={first['input']!r}: {reason}") from None


class EngineConfig(_Config, CompatibilitySettings):
    """How one model is served: field names are vLLM's where the meaning is the same."""

    model: str = Field(
        "",
        description="Folder of a checkpoint (config.json, *.safetensors), or its name at the Hugging Face hub "
        "(owner/model) or ModelScope (ms:owner/model); empty: the built-in model.",
    )
    tokenizer: str | None = Field(None, description="Folder of the tokenizer, where it is not the model's.")
    served_model_name: str | tuple[str, ...] | None = Field(
        None,
        description="Names that clients may use, of which answers give the first; default: the folder's name.",
    )
    skip_tokenizer_init: bool = Field(
        False, description="Load no tokenizer: prompts are token ids, and answers have ids and no text."
    )
    name: str = Field(DEFAULT_ENGINE_NAME, description="Name of the engine, as in get_engine(name).")
    dtype: Dtype = Field("auto", description="Type of weights and activations; auto: the checkpoint's.")
    device: Device = Field("auto", description="auto: CUDA where there is a GPU, else the CPU.")
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="Workers that share each layer.")
    distributed_executor_backend: Backend | None = Field(
        None, description="ray: worker actors; inproc: one worker in this process. Default: ray where needed."
    )
    max_model_len: int | None = Field(None, ge=1, description="Context length in tokens; default: the model's.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Sequences that run at once, at most.")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Tokens computed in one step, at most.")
    max_queued_requests: int | None = Field(
        1024, ge=1, description="Sequences that wait for a place, at most; more are refused. LLM: no limit."
    )
    max_queued_tokens: int | None = Field(
        2**20, ge=1, description="Prompt tokens that wait for a place, at most; more are refused. LLM: no limit."
    )
    block_size: int | None = Field(None, description="Tokens in a KV block; default: 8 on CPU, 64 on GPU.")
    num_kv_blocks: int | None = Field(None, ge=2, description="KV blocks of each worker; default: what memory allows.")
    gpu_memory_utilization: float = Field(0.92, gt=0, le=1, description="Share of a GPU's memory the engine may use.")
    kv_cache_memory_bytes: int | None = Field(
        None, ge=1, description="Memory for KV on each worker; default: by gpu_memory_utilization, or a CPU share."
    )
    enable_prefix_caching: bool = Field(True, description="Share KV blocks among requests with equal prefixes.")
    load_format: LoadFormat = Field(
        "auto", description="auto: safetensors, else PyTorch files (pt); dummy: random weights."
    )
    standby: Standby = Field(
        "off",
        description="A spare worker that takes a lost one's place: process (started, libraries imported), or weights "
        "(CPU only: every rank's weights loaded too, a second copy of the model in memory).",
    )
    driver_wait_s: float = Field(
        60.0, gt=0, description="Seconds a request waits for the next driver when the engine's own is lost."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of log lines: text, or a JSON object each.")
    log_file: str | None = Field(
        None,
        description="File that every process appends its log to. Default of serve: a new one, whose path it shows.",
    )
    otlp_traces_endpoint: str | None = Field(
        None, description="URL that OpenTelemetry traces are sent to, as http://HOST:4318/v1/traces. Default: none are."
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
        "auto", description="Notation of the model's tool calls; auto: the one that its chat template shows."
    )
    reasoning_parser: ReasoningParser = Field(
        "auto", description="Marks round the model's reasoning; auto: as its chat template shows; none: all is text."
    )
    max_logprobs: int = Field(
        DEFAULT_MAX_LOGPROBS,
        ge=-1,
        description="Log-probabilities that a request may ask for at each position; -1: the vocabulary.",
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Write tokens of log-probabilities as 'token_id:N': two tokens may have the same text."
    )
    enable_force_include_usage: bool = Field(
        False, description="Give usage in every chunk of every stream, asked for or not."
    )
    enable_per_request_metrics: bool = Field(False, description="Add to each answer what its request took, as metrics.")
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
        return None if value is None else _generation_fields_text(value)

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

    @field_validator("standby", mode="before")
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
            raise ValueError("the served model has a name twice")
        return value

    @property
    def layout(self) -> ParallelLayout:
        """How ranks share the model."""
        return ParallelLayout(tp=self.tensor_parallel_size, pp=self.pipeline_parallel_size)

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


GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""What of a generation_config.json is a default of requests: the fields that vLLM takes."""


def _generation_fields_text(value: Any) -> str:
    """An object of generation fields, or its JSON text, as JSON text: a frozen config holds nothing that changes."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError('give a JSON object, as {"temperature": 0.5}') from None
    if not isinstance(value, Mapping):
        raise ValueError('give a JSON object, as {"temperature": 0.5}')
    for name in value:
        if name not in GENERATION_FIELDS:
            near = did_you_mean(str(name), GENERATION_FIELDS)
            raise ValueError(f"unknown field {str(name)[:100]!r}{near}; known are {', '.join(GENERATION_FIELDS)}")
    return json.dumps(dict(value))


class ServerConfig(_Config):
    """How the HTTP endpoint listens and guards itself."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: tuple[str, ...] = Field(
        (), description="Key that clients must send, or @FILE with one key a line; repeatable. None: no key asked."
    )
    allowed_origins: tuple[str, ...] = Field(
        (),
        description="Web origin whose pages may call this server (CORS), or *; repeatable. None: its own alone.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Name that clients call this server by, *.DOMAIN or * (any); repeatable. Checked only without an "
        "API key, where IP addresses, localhost and --host are known.",
    )
    http_proxy: HttpProxy = Field(
        "auto",
        description="What stands before the ingress: HAProxy (Linux) or Serve's proxy in Python. auto: HAProxy "
        "where Ray brings it.",
    )
    enable_fault_injection: bool = Field(
        False, description="Let clients kill workers, to see the engine recover: POST /admin/kill_worker, dashboard."
    )
    num_ingress_replicas: int = Field(1, ge=1, le=64, description="Processes that speak HTTP.")
    read_timeout_s: float = Field(
        60.0, gt=0, description="Seconds a client may go without reading its stream before it is taken for gone."
    )
    shutdown_timeout_s: float = Field(30.0, ge=0, description="Seconds open requests get to finish at shutdown.")

    @field_validator("api_key", "allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _one_value_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def read_api_keys(self) -> tuple[str, ...]:
        """The keys themselves, with each `@FILE` replaced by its lines. `ConfigError` where a file gives none."""
        keys: list[str] = []
        for entry in self.api_key:
            keys += _keys_of_file(entry[1:]) if entry.startswith("@") else [entry]
        if not all(keys):
            raise ConfigError("api_key is empty: give a key, @FILE, or leave it out to ask for none")
        return tuple(keys)


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:
        return False


def _keys_of_file(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key file {path!r} cannot be read: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key file {path!r} holds no key: write one a line")
    return keys


def parse_settings(settings: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Sorts plain settings into the two configs; an unknown one is a `ConfigError` that names the nearest of both."""
    engine, server = EngineConfig.model_fields, ServerConfig.model_fields
    unknown = [name for name in settings if name not in engine and name not in server]
    if unknown:
        raise _unknown_setting(unknown[0], [*engine, *server])
    return (
        EngineConfig.parse({name: value for name, value in settings.items() if name in engine}),
        ServerConfig.parse({name: value for name, value in settings.items() if name in server}),
    )


class ModelShape(_Config):
    """What the driver needs of a model; no tensor in it."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_layers: int


class GenerationDefaults(_Config):
    """Sampling defaults of requests; None: the API's own. Made by `engine.generation_config`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_tokens_limit: int | None = None
    """The most that a request gets, whatever it asks for."""
    source: str = ""

    def sampling_fields(self) -> dict[str, Any]:
        """Those that are set, by the names of `SamplingParams`; without `max_tokens`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def described(self) -> str:
        """In one line; empty where nothing is set."""
        fields = {**self.sampling_fields(), "max_tokens": self.max_tokens}
        shown = ", ".join(f"{name} {value:g}" for name, value in fields.items() if value is not None)
        return f"{shown} ({self.source})" if shown else ""


class ResolvedConfig(_Config):
    """Config + model + device, decided once. Every process of an engine is given this same object."""

    engine: EngineConfig
    model_path: str
    tokenizer_path: str
    served_model_name: str
    served_model_aliases: tuple[str, ...] = ()
    """More names by which clients may call the model."""
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    backend: Backend
    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    shape: ModelShape
    architecture_module: str = ""
    """Import path of the module that reads the model's architecture, where it is not one of RayLLM's own."""
    num_threads: int
    """OpenMP threads of each worker on CPU."""
    generation: GenerationDefaults = GenerationDefaults()


class Environment:
    """The environment variables that RayLLM reads; `RLLM_*`, because `RAYLLM_*` is read by another product."""

    NAMES = (
        "CUDA_VISIBLE_DEVICES",
        "MODELSCOPE_ENDPOINT",
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RLLM_API_KEY",
        "RLLM_LOG_DIR",
        "RLLM_USE_MODELSCOPE",
        "XDG_RUNTIME_DIR",
    )

    @classmethod
    def given(cls) -> dict[str, str]:
        """Those that are set, with their values; secrets hidden."""
        secret = ("RAY_AUTH_TOKEN", "RLLM_API_KEY")
        return {name: "(hidden)" if name in secret else os.environ[name] for name in cls.NAMES if name in os.environ}

    @staticmethod
    def ha_proxy() -> bool | None:
        """Whether Serve shall put HAProxy before the ingress (`RAY_SERVE_ENABLE_HA_PROXY`); None: not said."""
        value = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY")
        return None if value is None else value.lower() in ("1", "true")

    @staticmethod
    def log_dir() -> str | None:
        return os.environ.get("RLLM_LOG_DIR")

    @staticmethod
    def runtime_dir() -> str | None:
        """The user's folder for what runs now (`XDG_RUNTIME_DIR`); None where there is none."""
        folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        return folder if os.path.isdir(folder) and os.access(folder, os.W_OK) else None

    @staticmethod
    def use_modelscope() -> bool:
        """Whether names of models without a prefix are ModelScope's (`RLLM_USE_MODELSCOPE`)."""
        return os.environ.get("RLLM_USE_MODELSCOPE", "").lower() in ("1", "true")

    @staticmethod
    def modelscope_endpoint() -> str:
        return os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")

    @staticmethod
    def terminal_is_dumb() -> bool:
        """Whether the terminal cannot rewrite a line."""
        return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")

    @staticmethod
    def ray_is_loopback_only() -> bool:
        """Whether Ray was told to listen on loopback alone, as a cluster of our own is."""
        return os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"

    @staticmethod
    def ray_address() -> str | None:
        """The Ray cluster to join (`RAY_ADDRESS`). None where there is none to join: not set, empty, or `local`, by
        which Ray too means one of the program's own."""
        address = os.environ.get("RAY_ADDRESS", "").strip()
        return None if address in ("", "local") else address

    @staticmethod
    def ray_token() -> str:
        """Ray's token itself (`RAY_AUTH_TOKEN`); empty where it is in a file."""
        return os.environ.get("RAY_AUTH_TOKEN", "")

    @staticmethod
    def ray_token_path() -> str:
        """The file of Ray's token (`RAY_AUTH_TOKEN_PATH`); empty: the one in the home folder."""
        return os.environ.get("RAY_AUTH_TOKEN_PATH", "")

    @staticmethod
    def has_home() -> bool:
        """Whether `HOME` is set; without it, the user's home folder is looked up."""
        return bool("HOME" in os.environ)

    @staticmethod
    def ray_auth_mode() -> str | None:
        """`token`, `disabled` or another way by which Ray lets programs in; None where nothing is said."""
        return os.environ.get("RAY_AUTH_MODE") or None

    @staticmethod
    def api_key() -> str | None:
        """The key that `rayllm chat` and `rayllm complete` send."""
        return os.environ.get("RLLM_API_KEY")


def count_gpus() -> int:
    """CUDA devices that this process may use, without importing torch."""
    devices = [path for path in glob.glob("/dev/nvidia[0-9]*") if path.removeprefix("/dev/nvidia").isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(devices)
    return min(len(devices), len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
