"""`python -m rayllm.entrypoints.api_server …`: vLLM's demo server. Its `POST /generate` is a path of `rayllm serve`."""

from __future__ import annotations

import sys

from rayllm.entrypoints.openai.api_server import main

if __name__ == "__main__":
    sys.exit(main())
