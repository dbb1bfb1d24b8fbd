"""The command `rayllm`: finds the verb and imports that verb's module alone, so that help and typos answer at once.

A verb's module has `run(argv) -> int`. Exit codes: 0 ok, 1 failure, 2 usage, 3 server not reachable,
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

VERBS = {
    "serve": ("rayllm.cli.serve", "start an OpenAI-compatible server on this machine"),
    "run": ("rayllm.cli.run", "chat with a model at once; it is fetched and served in the background where needed"),
    "demo": ("rayllm.cli.demo", "see it work: two workers, the built-in model, one streamed answer"),
    "chat": ("rayllm.cli.chat", "talk to a server, or to a model, in the terminal"),
    "complete": ("rayllm.cli.complete", "continue a prompt"),
    "run-batch": ("rayllm.cli.run_batch", "answer a file of requests in OpenAI's batch format"),
    "pull": ("rayllm.cli.pull", "download a model from Hugging Face or ModelScope"),
    "ps": ("rayllm.cli.ps", "list the servers that run here"),
    "status": ("rayllm.cli.status", "how a server is: load, KV use, tokens/s, faults, ranks"),
    "logs": ("rayllm.cli.logs", "print a server's log"),
    "stop": ("rayllm.cli.stop", "stop a server in order"),
    "bench": ("rayllm.cli.bench", "measure: throughput, latency, serving, start-up"),
    "config": ("rayllm.cli.config", "show settings and where they come from; check a file of them"),
    "doctor": ("rayllm.cli.doctor", "check this machine: libraries, devices, memory, disk, ports, limits"),
    "completion": ("rayllm.cli.completion", "print a completion script for bash, zsh or fish"),
    "version": ("rayllm.cli.version", "print the version"),
}


OTHER_WORDS = {
    "list": "'rayllm ps' lists the servers that run here",
    "ls": "'rayllm ps' lists the servers that run here; there is no list of downloaded models yet, they lie in the "
    "hub's cache",
    "rm": "downloaded models lie in the hub's cache, and no verb removes them yet; 'rayllm stop' ends a server",
    "start": "'rayllm serve [MODEL]' starts a server",
    "up": "'rayllm serve [MODEL]' starts a server",
    "kill": "'rayllm stop' ends a server",
    "down": "'rayllm stop' ends a server",
    "show": "'rayllm status' shows a server, 'rayllm config show' the settings",
    "info": "'rayllm status' shows a server, 'rayllm doctor' this machine",
    "download": "'rayllm pull MODEL' downloads a model",
    "generate": "'rayllm complete PROMPT' continues a prompt, 'rayllm chat' answers a message",
    "batch": "'rayllm run-batch' answers a file of requests",
}
"""What users of other tools type, and what does that here."""


def help_text() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in VERBS.items())
    return (
        "Usage: rayllm VERB [OPTIONS]\n\n"
        "The LLM inference engine that is native to Ray.\n\n"
        f"Verbs:\n{verbs}\n\n"
        "rayllm VERB --help tells a verb's options. Start here: rayllm demo\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; what a user can mend is one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    _print_what_the_terminal_cannot()
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return OK
    verb, *rest = words
    if verb in ("-V", "--version"):
        verb = "version"
    if verb not in VERBS:
        from rayllm.errors import did_you_mean

        if verb in OTHER_WORDS:
            return complain(f"rayllm: there is no verb {verb!r}: {OTHER_WORDS[verb]}", USAGE)
        kind = "option" if verb.startswith("-") else "verb"
        near = did_you_mean(verb, [*VERBS, "help", "--help", "--version"])
        return complain(f"rayllm: unknown {kind} {verb!r}{near} (see rayllm --help)", USAGE)
    code = _run(verb, rest)
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


def _run(verb: str, argv: list[str]) -> int:
    from rayllm.cli.flags import UsageError
    from rayllm.errors import ConfigError, EngineUnreachableError, HubUnreachableError, RayLLMError

    try:
        return int(import_module(VERBS[verb][0]).run(argv))
    except (UsageError, ConfigError) as error:
        return complain(f"rayllm {verb}: {error}", USAGE)
    except (EngineUnreachableError, HubUnreachableError) as error:
        return complain(f"rayllm {verb}: {error}", NOT_REACHABLE)
    except RayLLMError as error:
        return complain(f"rayllm {verb}: {error}", OUT_OF_MEMORY if is_out_of_memory(str(error)) else FAILURE)
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
