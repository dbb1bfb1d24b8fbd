"""The program `rayllm`: imports only the module of the command it is given, so that help and typos respond at once.

A command's module has `run(argv) -> int`. Exit codes: 0 ok, 1 failure, 2 usage, 3 server not reachable,
4 out of memory.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

OK, FAILURE, USAGE, NOT_REACHABLE, OUT_OF_MEMORY = range(5)
INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""

COMMANDS = {
    "serve": ("rayllm.cli.serve", "start an OpenAI-compatible server on this machine"),
    "run": ("rayllm.cli.run", "chat with a model; downloads it and starts a background server if needed"),
    "demo": ("rayllm.cli.demo", "run a demonstration: two workers, the built-in model, one streamed response"),
    "chat": ("rayllm.cli.chat", "chat with a server or a model in the terminal"),
    "complete": ("rayllm.cli.complete", "continue a prompt"),
    "run-batch": ("rayllm.cli.run_batch", "run a file of requests in OpenAI's batch format"),
    "pull": ("rayllm.cli.pull", "download a model from Hugging Face or ModelScope"),
    "plan": ("rayllm.cli.plan", "show what a model needs of memory, and what fits, before loading it"),
    "models": ("rayllm.cli.models", "list the architectures that can be served, and the files that are read"),
    "ps": ("rayllm.cli.ps", "list the running servers of this machine"),
    "status": ("rayllm.cli.status", "show a server's state: load, KV use, tokens/s, faults, ranks"),
    "logs": ("rayllm.cli.logs", "print a server's log"),
    "stop": ("rayllm.cli.stop", "stop a server gracefully"),
    "bench": ("rayllm.cli.bench", "measure: throughput, latency, serving, start-up"),
    "config": ("rayllm.cli.config", "show settings and their sources; check a settings file"),
    "doctor": ("rayllm.cli.doctor", "check this machine: libraries, devices, memory, disk, ports, limits"),
    "completion": ("rayllm.cli.completion", "print a completion script for bash, zsh or fish"),
    "version": ("rayllm.cli.version", "print the version"),
}


OTHER_WORDS = {
    "list": "'rayllm ps' lists the running servers of this machine",
    "ls": "'rayllm ps' lists the running servers of this machine; downloaded models are in the hub's cache, and no "
    "command lists them yet",
    "rm": "downloaded models are in the hub's cache, and no command removes them yet; 'rayllm stop' stops a server",
    "start": "'rayllm serve [MODEL]' starts a server",
    "up": "'rayllm serve [MODEL]' starts a server",
    "kill": "'rayllm stop' stops a server",
    "down": "'rayllm stop' stops a server",
    "show": "'rayllm status' shows a server, 'rayllm config show' the settings",
    "info": "'rayllm status' shows a server, 'rayllm doctor' this machine",
    "download": "'rayllm pull MODEL' downloads a model",
    "generate": "'rayllm complete PROMPT' continues a prompt, 'rayllm chat' answers a message",
    "batch": "'rayllm run-batch' answers a file of requests",
}
"""What users of other tools type, and what does that here."""


def help_text() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "Usage: rayllm COMMAND [OPTIONS]\n\n"
        "The LLM inference engine that is native to Ray.\n\n"
        f"Commands:\n{commands}\n\n"
        "rayllm COMMAND --help lists the options of a command. Start here: rayllm demo\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; what a user can fix is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    _print_what_the_terminal_cannot()
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return OK
    command, *rest = words
    if command in ("-V", "--version"):
        command = "version"
    if command not in COMMANDS:
        from rayllm.errors import did_you_mean

        if command in OTHER_WORDS:
            return complain(f"rayllm: there is no command {command!r}: {OTHER_WORDS[command]}", USAGE)
        kind = "option" if command.startswith("-") else "command"
        near = did_you_mean(command, [*COMMANDS, "help", "--help", "--version"])
        return complain(f"rayllm: unknown {kind} {command!r}{near} (see rayllm --help)", USAGE)
    code = _run(command, rest)
    if (connection := sys.modules.get("rayllm.executor.ray_connection")) and not connection.await_goodbye(0):
        sys.stdout.flush()
        os._exit(code)  # a dead Ray would keep this process for many seconds
    return code


def _print_what_the_terminal_cannot() -> None:
    """Characters outside the terminal's encoding are shown as '?', where Python would fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def complain(line: str, code: int) -> int:
    """Says `line` on stderr and hands back `code`."""
    print(line, file=sys.stderr)
    return code


def _run(command: str, argv: list[str]) -> int:
    from rayllm.cli.flags import UsageError
    from rayllm.errors import ConfigError, EngineUnreachableError, HubUnreachableError, RayLLMError

    try:
        return int(import_module(COMMANDS[command][0]).run(argv))
    except (UsageError, ConfigError) as error:
        return complain(f"rayllm {command}: {error}", USAGE)
    except (EngineUnreachableError, HubUnreachableError) as error:
        return complain(f"rayllm {command}: {error}", NOT_REACHABLE)
    except RayLLMError as error:
        return complain(f"rayllm {command}: {error}", OUT_OF_MEMORY if is_out_of_memory(str(error)) else FAILURE)
    except BrokenPipeError:
        sys.stderr.close()
        return FAILURE
    except KeyboardInterrupt:
        return complain("", INTERRUPTED)


def is_out_of_memory(message: str) -> bool:
    """Whether a failure's text says that memory ran out."""
    lowered = message.lower()
    return any(sign in lowered for sign in ("out of memory", "outofmemory", "memoryerror", "cannot allocate memory"))


if __name__ == "__main__":
    sys.exit(main())
