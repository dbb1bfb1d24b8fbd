"""`rayllm plan`: what a model needs of memory and what would fit, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import Parser, UsageError, add_config_flags, flag_name
from rayllm.cli.main import OUT_OF_MEMORY
from rayllm.config import EngineConfig

if TYPE_CHECKING:
    from rayllm.config import ResolvedConfig
    from rayllm.models.fit import Fit

_FLAGS = (
    "tensor_parallel_size",
    "enable_expert_parallel",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "dtype",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "revision",
    "download_dir",
    "trust_remote_code",
)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT])i?B?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_MEDIUM_REQUEST = 2048


def parser() -> Parser:
    made = Parser(
        prog="rayllm plan",
        description="Show what a model needs of memory and how many requests fit; nothing is loaded. Exit code 4: it "
        "does not fit.",
    )
    made.add_argument(
        "model", metavar="MODEL", nargs="?", help="a checkpoint folder or hub name (default: the built-in model)"
    )
    made.add_argument("--gpu", metavar="SIZE", help="memory of each GPU, as 24GiB (default: this machine's device)")
    made.add_argument("--memory", metavar="SIZE", help="memory for CPU workers, as 16GiB (default: what is free here)")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    add_config_flags(made, EngineConfig, only=_FLAGS)
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the plan, and where it does not fit, what would, as commands."""
    from rayllm.models.fit import Fit, remedies

    given = parser().parse(argv)
    as_json = given.pop("json", False)
    sizes: dict[str, int] = {name: parse_size(name, given.pop(name)) for name in ("gpu", "memory") if name in given}
    config, device_bytes = resolve_plan(given, sizes)
    fit = Fit.of(config, device_bytes)
    commands = [] if fit.is_enough else [_command(given, changes) for changes in remedies(config, device_bytes)]
    if as_json:
        print(json.dumps({**_as_json(fit, device_bytes), "would_fit": commands}))
    else:
        print(_as_text(fit, device_bytes, commands))
    return 0 if fit.is_enough else OUT_OF_MEMORY


def parse_size(name: str, text: str) -> int:
    """Bytes of `24GiB`, `24G` (the same: memory is counted in powers of 1024) or `512 MiB`. `UsageError` for anything
    else, a number without a unit included."""
    found = _SIZE.fullmatch(text.strip())
    num_bytes = 0 if found is None else int(float(found[1]) * 1024 ** _POWERS[found[2].upper()])
    if num_bytes < 1:
        raise UsageError(f"--{name} {text!r} is not a size of memory: give a number and a unit, as 24GiB")
    return num_bytes


def resolve_plan(given: dict[str, Any], sizes: dict[str, int]) -> tuple[ResolvedConfig, int]:
    """The settings that `serve` would work out on a machine with enough devices, and the memory of its GPU, or of all
    that CPU ranks share. `ConfigError` and `HubUnreachableError` as for `serve`."""
    from rayllm.config import count_gpus
    from rayllm.engine.owner.resolve import resolve
    from rayllm.machine.memory import available_host_bytes, gpu_bytes
    from rayllm.weights.hub import config_folder

    if len(sizes) > 1:
        raise UsageError("give --gpu or --memory, not both: a model runs on one kind of device")
    gpu = sizes.get("gpu")
    if gpu is None and not sizes and count_gpus():
        gpu = gpu_bytes()
    device = "cpu" if gpu is None else "cuda"
    engine = EngineConfig.parse({"model": "", **given, "device": device})
    folder = config_folder(engine)
    if folder is not None:
        engine = EngineConfig.parse({**given, "model": str(folder), "device": device})
    size = engine.layout.num_ranks
    resolved = resolve(engine, num_gpus=size, num_cores=size, backend="ray")
    return resolved, gpu or sizes.get("memory") or available_host_bytes()


def _command(given: dict[str, Any], changes: dict[str, Any]) -> str:
    settings = {name: value for name, value in {**given, **changes}.items() if name != "model"}
    words = ["rayllm", "serve", *([given["model"]] if "model" in given else [])]
    for name, value in settings.items():
        words += [flag_name(name)] if value is True else [flag_name(name), str(value)]
    return shlex.join(words)


def _as_json(fit: Fit, device_bytes: int) -> dict[str, Any]:
    config, needs = fit.config, fit.needs
    return {
        "model": config.served_model_name,
        "architecture": config.spec.architecture,
        "dtype": config.dtype,
        "device": config.device,
        "device_bytes": device_bytes,
        "tensor_parallel_size": config.engine.tensor_parallel_size,
        "weight_bytes": needs.weights,
        "activation_bytes": needs.activations,
        "kv_bytes_per_token": needs.kv_per_token,
        "kv_bytes": fit.kv_bytes,
        "kv_tokens": fit.num_kv_tokens,
        "model_context": config.spec.max_model_len,
        "max_model_len": fit.max_model_len,
        "full_length_requests": round(fit.num_requests(max(1, fit.max_model_len)), 2),
        "fits": fit.is_enough,
    }


def _as_text(fit: Fit, device_bytes: int, commands: Sequence[str]) -> str:
    from rayllm.cli.table import amount, table

    config, needs, spec = fit.config, fit.needs, fit.config.spec
    size, where = config.engine.layout.num_ranks, "GPU" if config.device == "cuda" else "CPU"
    if config.device == "cuda":
        device = f"{size} x GPU of {amount(device_bytes)}, of which {config.engine.gpu_memory_utilization:.0%} are used"
    else:
        device = f"CPU with {amount(device_bytes)} free, {size} rank{'s' if size > 1 else ''}"
    how = "estimated: measured at start" if config.device == "cuda" else "at most"
    rows = [
        ("model", f"{config.served_model_name} ({spec.architecture}, {spec.num_layers} layers, {config.dtype})"),
        ("device", device),
        (f"weights per {where} rank", amount(needs.weights)),
        ("activations", f"{amount(needs.activations)} ({how}, {config.max_num_batched_tokens} tokens per step)"),
        ("KV per token", amount(needs.kv_per_token)),
        ("room for KV", f"{amount(fit.kv_bytes)}: {fit.num_kv_tokens} tokens"),
        ("context", _context(fit)),
    ]
    if fit.is_enough:
        lengths = sorted({fit.max_model_len, min(_MEDIUM_REQUEST, fit.max_model_len)}, reverse=True)
        held = [f"{fit.num_requests(length):.4g} of {length} tokens" for length in lengths]
        rows.append(("requests at once", ", ".join(held)))
    lines = [table(("memory", "plan"), rows)]
    if not fit.is_enough:
        lines += ["", "It does not fit. " + ("These would:" if commands else "No setting of RayLLM changes that.")]
        lines += [f"  {command}" for command in commands]
    return "\n".join(lines)


def _context(fit: Fit) -> str:
    asked, has = fit.config.engine.max_model_len, fit.config.spec.max_model_len
    of = f"asked for: {asked}" if asked is not None else f"the model's: {has}"
    return f"{fit.max_model_len} tokens ({of})"
