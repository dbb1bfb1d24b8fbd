"""`rayllm serve`: an OpenAI-compatible server, started in one line and gone without trace on Ctrl-C."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import Parser, UsageError, add_config_flags
from rayllm.cli.vllm_flags import translate, translate_setting
from rayllm.config import EngineConfig, ResolvedConfig, ServerConfig, parse_settings
from rayllm.settings_file import read_settings_file

if TYPE_CHECKING:
    from rayllm.cli.terminal import Screen
    from rayllm.engine.driver.actor import EngineDescription
    from rayllm.serve.running_server import RunningServer


def parser() -> Parser:
    made = Parser(
        prog="rayllm serve",
        usage="rayllm serve [MODEL] [OPTIONS]",
        description="Start an OpenAI-compatible server on this machine, or in the Ray cluster at RAY_ADDRESS.",
    )
    add_serve_flags(made)
    return made


def add_serve_flags(parser: Parser) -> None:
    """MODEL, --config and a flag for each setting."""
    text = "a checkpoint folder or hub name (default: the built-in model)"
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help=text)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of settings with the names of these flags; flags take precedence"
    )
    add_config_flags(parser, EngineConfig, ServerConfig)


def parse_serve(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """The configs for a command line. `UsageError` or `ConfigError` for what is wrong in it."""
    in_file, flags = settings_from(parser().parse(argv))
    return parse_settings({**in_file, **flags})


def settings_from(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of `--config`, and those of the flags, which win and of which the positional model is one."""
    flags = {name: value for name, value in given.items() if name not in ("positional_model", "config")}
    model = given.get("positional_model")
    _check_model_comes_first(flags)
    if model is not None and flags.setdefault("model", model) != model:
        raise UsageError(f"two models are given, MODEL {model!r} and --model {flags['model']!r}: give one")
    return read_settings_file(given["config"], _ours) if "config" in given else {}, flags


def _ours(name: str, value: Any) -> str | None:
    """A setting of the file, which may be vLLM's; what is said of one that has no effect goes to standard error."""
    found, note = translate_setting(name, value)
    if note:
        print(note, file=sys.stderr)
    return found


def _check_model_comes_first(flags: Mapping[str, Any]) -> None:
    """All words behind --served-model-name are names, also one that was meant as MODEL."""
    for name in flags.get("served_model_name", ())[1:]:
        if name and Path(name).is_dir():
            raise UsageError(f"{name!r} is a folder given to --served-model-name: give MODEL before the flags")


def run(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C or SIGTERM; 0 when it was stopped so."""
    argv, notes = translate(argv)
    engine, server = parse_serve(argv)
    for line in notes:
        print(line, file=sys.stderr)

    from rayllm.cli.serving import check_before_start, foreground_server

    check_before_start(engine, server)
    try:
        with foreground_server("serve", engine, server) as (screen, running):
            _announce(screen, running)
            _wait(running)
    except KeyboardInterrupt:
        print("stopped")
    return 0


_ENGINE_CHECK_S = 2


def _wait(running: RunningServer) -> None:
    raise_if_engine_failed = running.engine_watch()
    for second in itertools.count():
        running.ray.wait_lost(1.0)
        running.ray.raise_if_lost()
        if second % _ENGINE_CHECK_S == 0:
            raise_if_engine_failed()


def _announce(screen: Screen, running: RunningServer) -> None:
    engine = running.describe()
    screen.box("RayLLM is ready", summary(running, engine))
    screen.print(f"{curl_line(running.url, engine.served_model_name, has_key=bool(running.server.api_key))}\n")
    screen.print(f"log: {screen.log_path}\nPress Ctrl-C to stop. Chat with it: rayllm chat")


def summary(running: RunningServer, engine: EngineDescription) -> list[tuple[str, str]]:
    """The lines of the box: what is served, where, on what, and how much of it at once."""
    config = ResolvedConfig.model_validate_json(engine.config)
    concurrency = config.num_full_sequences(engine.num_blocks)
    num_tokens = int(concurrency * config.max_model_len)
    pages = [("chat page", "/"), ("dashboard", "/dashboard")]
    devices = Counter(device for worker in engine.workers for device in worker.devices)
    return [
        ("model", engine.served_model_name),
        ("URL", f"{running.url}/v1"),
        *((name, f"{running.url}{path}") for name, path in pages if running.has_page(path)),
        ("Ray", running.ray_address),
        ("from Python", python_line(running.engine.name)),
        ("devices", ", ".join(f"{count} x {device}" if count > 1 else device for device, count in devices.items())),
        ("parallelism", f"tensor {config.engine.tensor_parallel_size}"),
        ("dtype", config.dtype),
        ("context", f"{config.max_model_len:,} tokens"),
        *([("sampling defaults", described)] if (described := config.generation.described()) else []),
        ("KV cache", f"{num_tokens:,} tokens ({engine.num_blocks:,} blocks of {config.block_size})"),
        ("concurrency", f"{concurrency:,.1f} requests of full length at once"),
    ]


def python_line(name: str) -> str:
    """What gives the engine in a program on this machine, to be pasted."""
    return f"import rayllm; engine = rayllm.get_engine({name!r})"


def curl_line(url: str, model: str, *, has_key: bool) -> str:
    """A first request, to be pasted into a shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "Authorization: Bearer $RLLM_API_KEY"' if has_key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
