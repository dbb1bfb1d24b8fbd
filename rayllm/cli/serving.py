"""Starts the server of a command that needs one of its own: `serve`, `demo`, and `chat` or `run-batch` with MODEL."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.cli.terminal import Screen, interrupted_by_signals, new_log_file
from rayllm.compatibility import notes
from rayllm.config import EngineConfig, Environment, ServerConfig
from rayllm.errors import ConfigError, EngineError
from rayllm.machine.folders import check_working_folder
from rayllm.machine.registry import listed

if TYPE_CHECKING:
    from rayllm.serve.running_server import RunningServer


def check_before_start(engine: EngineConfig, server: ServerConfig) -> None:
    """Finds what is bound to fail while it still costs a second: `ConfigError`. A model that is named by its hub's name
    and not on this machine is downloaded first."""
    from rayllm.cli.pull import download_shown
    from rayllm.engine.owner.resolve import resolve
    from rayllm.machine.ports import check_port
    from rayllm.text.tokenizer_files import check_vocabulary_files
    from rayllm.weights.hub import downloaded_folder
    from rayllm.weights.hub_model import HubModel

    check_working_folder()
    server.read_api_keys()
    joins = Environment.ray_address() is not None
    if server.port and not joins:
        check_port(server.host, server.port)
    model = HubModel.of(engine)
    if model is not None and downloaded_folder(model) is None:
        download_shown(model)
    device, runs_code, of_model = "cpu" if engine.device == "cpu" else "cuda", True, []
    if not joins:  # else the cluster decides what there is room for
        resolved = resolve(engine, backend="ray")
        device, runs_code, of_model = resolved.device, resolved.spec.runs_code, resolved.spec.notes()
        _check_weights(engine, resolved.model_path)
        if not engine.skip_tokenizer_init:
            check_vocabulary_files(Path(resolved.tokenizer_path))
    for line in [*notes(engine, device, runs_code=runs_code), *of_model]:
        print(line, file=sys.stderr)
    _warn_of_open_door(server)


def _warn_of_open_door(server: ServerConfig) -> None:
    if not server.api_key and not server.is_loopback:
        print(
            f"WARNING: listening on {server.host} without an API key: anyone who can reach this machine can use the "
            "model and see its statistics. Give --api-key KEY (or @FILE), or --host 127.0.0.1.",
            file=sys.stderr,
        )


def _check_weights(engine: EngineConfig, model_path: str) -> None:
    from rayllm.weights.files import holds_weights

    if engine.load_format != "dummy" and not holds_weights(Path(model_path)):
        raise ConfigError(
            f"{model_path} has neither model.safetensors nor pytorch_model.bin: give the folder of a complete "
            "checkpoint, or --load-format dummy for random weights"
        )


@contextlib.contextmanager
def foreground_server(
    command: str, engine: EngineConfig, server: ServerConfig, *, quiet: bool = False
) -> Iterator[tuple[Screen, RunningServer]]:
    """A server for the length of the block, and the screen that is the terminal meanwhile. SIGINT, SIGTERM and SIGHUP
    raise `KeyboardInterrupt`; an `EngineError` says where the details are."""
    log_path = _log_path(command, engine)
    with (
        _details_named(log_path),
        Screen.open(log_path, quiet=quiet, chatter_path=_chatter_path(log_path, engine)) as screen,
        interrupted_by_signals(),
        _listed_server(command, engine, server, screen) as running,
    ):
        yield screen, running


@contextlib.contextmanager
def background_server(command: str, engine: EngineConfig, server: ServerConfig) -> Iterator[RunningServer]:
    """Like `foreground_server`, but from the moment the server is ready the terminal is the caller's."""
    log_path = _log_path(command, engine)
    chatter_path = _chatter_path(log_path, engine)
    with contextlib.ExitStack() as stack:
        screen_opened = Screen.open(log_path, chatter_path=chatter_path)
        with _details_named(log_path), screen_opened as screen, interrupted_by_signals():
            running = stack.enter_context(_listed_server(command, engine, server, screen))
        try:
            yield running
        finally:
            with Screen.open(log_path, quiet=True, chatter_path=chatter_path):  # Ray talks while it ends
                stack.close()


def _log_path(command: str, engine: EngineConfig) -> Path:
    return Path(engine.log_file).expanduser().absolute() if engine.log_file else new_log_file(command)


def _chatter_path(log_path: Path, engine: EngineConfig) -> Path:
    """Where what Ray and libraries print goes: beside a log of JSON, whose every line is JSON, and else into it."""
    return log_path.with_suffix(".out") if engine.log_format == "json" else log_path


@contextlib.contextmanager
def _details_named(log_path: Path) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error} (details: {log_path})", code=error.code) from None


@contextlib.contextmanager
def _listed_server(command: str, engine: EngineConfig, server: ServerConfig, screen: Screen) -> Iterator[RunningServer]:
    """A running server that `rayllm ps` shows from its first moment on."""
    from rayllm.engine.owner.resolve import served_name
    from rayllm.executor.ray_cluster import free_port
    from rayllm.machine.processes import adopt_orphans
    from rayllm.observability.logs import setup_logging
    from rayllm.serve.lifecycle import running_server
    from rayllm.serve.running_server import server_url

    adopt_orphans()
    given = engine.model_fields_set
    engine = engine.model_copy(update={"log_file": str(screen.log_path)})
    setup_logging(engine.log_format, process="server", file=engine.log_file)
    server = server.model_copy(update={"port": server.port or free_port(server.host)})
    entry = listed(
        command,
        name=engine.name,
        name_is_given="name" in given,
        model=next(iter(engine.served_model_names), None) or served_name(engine.model),
        url=server_url(server),
        log=screen.log_path,
        shutdown_timeout_s=server.shutdown_timeout_s,
    )
    with entry as listing:
        engine = engine.model_copy(update={"name": listing.entry.name})
        with running_server(engine, server, on_stage=screen.stage, on_ray=listing.note_ray) as running:
            yield running
