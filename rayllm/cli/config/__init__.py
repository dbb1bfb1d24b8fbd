"""`rayllm config`: what the settings of a server are, and whether a file of them holds."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.cli.subcommands import run_subcommand

SUBCOMMANDS = {
    "show": ("rayllm.cli.config.show", "every setting, its value, and where that comes from"),
    "validate": ("rayllm.cli.config.validate", "check a YAML file of settings"),
}


def run(argv: Sequence[str]) -> int:
    """Runs the one that is named first."""
    return run_subcommand("config", SUBCOMMANDS, argv)
