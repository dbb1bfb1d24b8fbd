"""`python -m rayllm.entrypoints.openai.api_server …` is `rayllm serve …`, which takes vLLM's flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rayllm.cli.main import main as command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit code."""
    return command_line(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
