"""Config + model + machine -> `ResolvedConfig`, once, before anything heavy is started.

No torch here: the command line calls this to refuse a bad setting within a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rayllm.config import Backend, EngineConfig, ModelShape, ResolvedConfig, count_cores, count_gpus
from rayllm.demo import DEMO_MODEL_NAME, model_path
from rayllm.engine.owner.generation_config import FILE_NAME, generation_config_file, generation_defaults
from rayllm.errors import ConfigError
from rayllm.kv_layout import num_blocks_for
from rayllm.models.config_fields import text_config
from rayllm.models.memory_plan import least_context
from rayllm.models.registry import outside_module, read_spec
from rayllm.models.split import check_split
from rayllm.spec import DecoderSpec
from rayllm.text.end_token import end_token_id
from rayllm.weights.config_file import read_json, with_overrides
from rayllm.weights.hub import local_model
from rayllm.weights.hub_cache import cached_name, snapshot_of
from rayllm.weights.hub_model import MODELSCOPE_PREFIX, HubModel

_CPU_BLOCK_SIZE = 8
_GPU_BLOCK_SIZE = 64
_CPU_STEP_TOKENS = 2048
_GPU_STEP_TOKENS = 8192


def resolve(
    config: EngineConfig, *, num_gpus: int | None = None, num_cores: int | None = None, backend: Backend | None = None
) -> ResolvedConfig:
    """Decides all that `config` leaves open. `num_gpus` and `num_cores` are what the engine's machine has (default:
    this machine); `backend` is what to use where the config does not say (default: ray for more than one worker).

    Raises `ConfigError`, one line that says how to fix it, for whatever can be known to fail before loading weights.
    """
    num_gpus = count_gpus() if num_gpus is None else num_gpus
    num_cores = count_cores() if num_cores is None else num_cores
    path = local_model(config) or _model_folder(config.model, config.revision)
    spec = _read_spec(config, path)
    device = _device(config, num_gpus)
    size = config.layout.num_ranks
    available, kind = (num_gpus, "GPUs") if device == "cuda" else (num_cores, "CPU cores")
    if size > available:
        raise ConfigError(
            f"tensor_parallel_size={size} needs {size} {kind}, this machine has {available}: "
            f"use at most {available}, or start Ray on more nodes and set RAY_ADDRESS"
        )
    check_split(spec, config.layout)
    backend = config.distributed_executor_backend or backend or ("ray" if size > 1 else "inproc")
    if backend == "inproc" and size > 1:
        raise ConfigError(f"tensor_parallel_size={size} needs worker processes: distributed_executor_backend='ray'")
    block_size = config.block_size or (_GPU_BLOCK_SIZE if device == "cuda" else _CPU_BLOCK_SIZE)
    max_model_len = _max_model_len(config, spec.max_model_len)
    tokenizer = Path(config.tokenizer).expanduser() if config.tokenizer else path
    if not tokenizer.is_dir():
        raise ConfigError(f"tokenizer folder {config.tokenizer!r} does not exist")
    names = config.served_model_names or (served_name(config.model),)
    resolved = ResolvedConfig(
        engine=config,
        model_path=str(path),
        tokenizer_path=str(tokenizer),
        served_model_name=names[0],
        served_model_aliases=names[1:],
        dtype=_dtype(config.dtype, spec.dtype),
        device=device,
        backend=backend,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens
        or (_GPU_STEP_TOKENS if device == "cuda" else _CPU_STEP_TOKENS),
        shape=ModelShape(
            vocab_size=spec.vocab_size,
            eos_token_ids=_end_token_ids(config, path, tokenizer, spec.vocab_size),
            num_layers=spec.num_layers,
        ),
        spec=spec,
        architecture_module=outside_module(spec.architecture),
        num_threads=max(1, num_cores // size),
        generation=generation_defaults(config, path),
    )
    _check_num_kv_blocks(resolved)
    return resolved


def _check_num_kv_blocks(config: ResolvedConfig) -> None:
    asked, num_blocks = config.engine.max_model_len, config.engine.num_kv_blocks
    least = least_context(asked, config.max_model_len)
    spans = config.kv_spans()
    needed = num_blocks_for(spans, least)
    if num_blocks is not None and num_blocks < needed:
        groups = f" in each of {len(spans)} groups of layers" if len(spans) > 1 else ""
        raise ConfigError(
            f"num_kv_blocks={num_blocks} of {config.block_size} tokens cannot hold one sequence of "
            f"{'max_model_len=' if asked else ''}{least} tokens{groups}: raise num_kv_blocks to {needed}, or lower "
            "max_model_len"
        )


def served_name(model: str) -> str:
    """What a model is called by clients where nothing else is said: its hub's name, or its folder's."""
    if HubModel.parse(model) is not None:
        return model.removeprefix(MODELSCOPE_PREFIX)
    if not model:
        return DEMO_MODEL_NAME
    folder = Path(model).expanduser().resolve()
    return cached_name(folder) or folder.name


def _model_folder(model: str, revision: str | None) -> Path:
    if not model:
        return model_path()
    path = Path(model).expanduser()
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"model folder {model!r} {kind}: give the folder that holds config.json and *.safetensors")
    return snapshot_of(path.resolve(), revision)


def _device(config: EngineConfig, num_gpus: int) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and num_gpus == 0:
        raise ConfigError("device='cuda', but no NVIDIA GPU is visible: use device='cpu' or check CUDA_VISIBLE_DEVICES")
    if config.device == "auto":
        return "cuda" if num_gpus else "cpu"
    return config.device


def _dtype(asked: str, stored: str) -> Any:
    if asked != "auto":
        return asked
    return stored if stored in ("float32", "bfloat16", "float16") else "float32"


def _max_model_len(config: EngineConfig, model_max: int) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model_max:
        raise ConfigError(f"max_model_len={asked} is more than the model's context of {model_max} tokens: lower it")
    return asked or model_max


def _read_spec(config: EngineConfig, path: Path) -> DecoderSpec:
    overrides = config.config_overrides
    spec = read_spec(path, config.model_impl, trust_remote_code=config.trust_remote_code, overrides=overrides)
    if overrides and spec.transformers is not None and spec.transformers.code_files:
        raise ConfigError("hf_overrides: this model's own code reads its config.json, so edit that file instead")
    return spec


def _end_token_ids(config: EngineConfig, path: Path, tokenizer: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokenizer's, then those that generation_config.json (the model's, or that of `generation_config`) and
    config.json name. Nonsense is refused in the two files; a tokenizer's id that the model cannot write ends nothing.
    """
    of_tokenizer = end_token_id(tokenizer)
    found = [of_tokenizer] if of_tokenizer is not None and of_tokenizer < vocab_size else []
    for file in (generation_config_file(config, path) or path / FILE_NAME, path / "config.json"):
        fields = read_json(file) if file.is_file() else {}
        if file.name == "config.json":
            fields = with_overrides(fields, config.config_overrides)
        value = text_config(fields).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ConfigError(f"{file}: eos_token_id={value!r} must be token ids below vocab_size={vocab_size}")
        found += ids
    return tuple(dict.fromkeys(found))
