"""`rayllm complete PROMPT`: prints how a running server continues a prompt, as the tokens come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rayllm.cli.connect import add_server_flags, connected
from rayllm.cli.flags import Parser, UsageError
from rayllm.cli.sampling_flags import add_param_flags, params_of


def parser() -> Parser:
    made = Parser(prog="rayllm complete", description="Continue a prompt.")
    made.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="text; '-', or no PROMPT in a pipe: read standard input"
    )
    add_server_flags(made)
    add_param_flags(made)
    made.add_argument("--echo", action="store_true", help="print the prompt first")
    made.add_argument("--stats", action="store_true", help="print tokens and speed to stderr")
    return made


def run(argv: Sequence[str]) -> int:
    """Streams one continuation to stdout; timing goes to stderr with --stats."""
    given = parser().parse(argv)
    params, prompt = params_of(given), _prompt(given)

    from rayllm.cli.answer import Timing

    with connected(given) as client:
        model = given.get("served_model_name") or client.model()
        timing = Timing()
        if given.get("echo"):
            print(prompt, end="", flush=True)
        try:
            for text in client.stream_completion(prompt, {"model": model, **params}, timing):
                print(text, end="", flush=True)
        finally:
            if timing.num_tokens or given.get("echo"):  # what went wrong gets a line of its own
                print()
    if given.get("stats"):
        print(timing, file=sys.stderr)
    return 0


def _prompt(given: dict[str, Any]) -> str:
    """What was given, or stdin without the line end that `echo` adds. `UsageError` where there is no text."""
    asked = given.get("prompt")
    if asked is None and sys.stdin.isatty():
        raise UsageError("give a PROMPT, or pipe one to standard input")
    prompt: str = sys.stdin.read().removesuffix("\n") if asked in (None, "-") else asked
    if not prompt:
        raise UsageError("the prompt is empty: give some text to continue")
    return prompt
