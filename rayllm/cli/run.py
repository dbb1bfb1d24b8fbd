"""`rayllm run [MODEL] [PROMPT]`: talk to a model at once. A server that serves it already is used; else it is
downloaded where it is not on this machine, and served in the background, where it stays."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayllm.cli.connect import connected
from rayllm.cli.flags import Parser, UsageError, add_config_flags
from rayllm.cli.sampling_flags import add_param_flags, params_of
from rayllm.config import EngineConfig

if TYPE_CHECKING:
    from rayllm.cli.background import Found
    from rayllm.cli.client import ApiClient

_ENGINE_FLAGS = ("tensor_parallel_size", "dtype", "device", "max_model_len", "name", "revision", "download_dir")


def parser() -> Parser:
    made = Parser(
        prog="rayllm run",
        usage="rayllm run [MODEL] [PROMPT ...] [OPTIONS]",
        description="Chat with a model, or have it answer one PROMPT (standard input is read before it, where "
        "something is piped in). The model is served in the background and keeps running; rayllm stop stops it.",
    )
    made.add_argument(
        "model_folder",
        metavar="MODEL",
        nargs="?",
        help="a checkpoint's folder, hub name, or what a running server calls its model "
        "(default: what the only running server serves, else the built-in model)",
    )
    made.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="a single question; without one, a conversation starts"
    )
    made.add_argument("--api-key", help="API key to send (default: RLLM_API_KEY)")
    made.add_argument("--system", metavar="TEXT", help="system prompt")
    made.add_argument(
        "--port", type=int, help="port to serve at (default: 8000, or a free one where that is taken; 0: a free one)"
    )
    made.add_argument("--stop", action="store_true", help="stop the server afterwards if this command started it")
    add_param_flags(made)
    add_config_flags(made, EngineConfig, only=_ENGINE_FLAGS)
    return made


def run(argv: Sequence[str]) -> int:
    """Finds or starts the server, then chats, or prints one answer; says in the end how to stop what it started."""
    given = _parse(argv)
    params_of(given)
    prompt = _prompt(given)
    settings = {name: given[name] for name in _ENGINE_FLAGS if name in given}

    from rayllm.cli.background import find_or_start, stop

    found = find_or_start(given.get("model_folder"), settings, given.get("port"))
    try:
        with connected({**given, "url": found.entry.url}) as client:
            return _talk(client, {**given, "served_model_name": found.entry.model}, prompt)
    finally:
        if found.is_new and given.get("stop"):
            stop(found.entry)
        elif found.is_new:
            _say_where(found)


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """As `Parser.parse`, with options also between MODEL and the words of PROMPT."""
    made = parser()
    found, left = made.parse_known_args(list(argv))
    if unknown := [word for word in left if word.startswith("-")]:
        made.parse(unknown)  # which says what is wrong with it
    given = vars(found)
    return {**given, "prompt": [*given.get("prompt", ()), *left]}


def _talk(client: ApiClient, given: dict[str, Any], prompt: str | None) -> int:
    if prompt is None:
        from rayllm.cli.chat import chat

        return chat(client, given)

    from rayllm.cli.answer import Timing
    from rayllm.cli.prompt import ChatPrompt

    messages = [{"role": "system", "content": given["system"]}] if "system" in given else []
    messages.append({"role": "user", "content": prompt})
    shown = ChatPrompt(()).open_answer()
    try:
        for piece in client.stream_chat(messages, {"model": given["served_model_name"], **params_of(given)}, Timing()):
            if not piece.is_reasoning:
                shown.write(piece.text)
    finally:
        shown.end()
        print(flush=True)
    return 0


def _prompt(given: dict[str, Any]) -> str | None:
    """What to ask once: standard input where something is piped in, then the words. None for a conversation.
    `UsageError` where nothing comes of either."""
    words = " ".join(given.get("prompt") or ())
    if sys.stdin.isatty():
        return words or None
    piped = sys.stdin.read().strip("\n") if not words or _is_piped() else ""
    if not piped and not words:
        raise UsageError("standard input is empty: give a PROMPT, pipe one in, or run it on a terminal to chat")
    return "\n\n".join(filter(None, (piped, words)))


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, not merely something that is no terminal."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _say_where(found: Found) -> None:
    entry = found.entry
    print(f"{entry.model} is still served at {entry.url}; rayllm stop {entry.pid} stops it", file=sys.stderr)
