"""Commands with subcommands: `rayllm bench serve`, `rayllm config show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from rayllm.cli.flags import UsageError
from rayllm.errors import did_you_mean

Subcommands = Mapping[str, tuple[str, str]]
"""By name: the module, which has `parser()` and `run(argv) -> int`, and what it does."""


def run_subcommand(command: str, subcommands: Subcommands, argv: Sequence[str]) -> int:
    """Runs the one that `argv` begins with, or prints what there is."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, subcommands))
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in subcommands.items())
        usage = f"Usage: rayllm {command} SUBCOMMAND [OPTIONS]"
        print(f"{usage}\n\n{lines}\n\nrayllm {command} SUBCOMMAND --help lists its options.")
        return 0
    name, *rest = argv
    if name not in subcommands:
        known = ", ".join(subcommands)
        raise UsageError(f"there is no 'rayllm {command} {name}'{did_you_mean(name, subcommands)} (known: {known})")
    return int(import_module(subcommands[name][0]).run(rest))
