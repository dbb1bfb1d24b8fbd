"""The built-in model, or the one that `args` name, as a Serve application.

serve run serve_apps.chat:app                              the built-in model
serve run serve_apps.chat:build model=/models/qwen         another one
serve deploy serve_apps/config/chat.yaml                   the same on a running cluster
"""

from __future__ import annotations

from typing import Any

from ray import serve

from rayllm.serve.builder import build_app

app = build_app({})


def build(args: dict[str, Any]) -> serve.Application:
    """The application for settings named as the flags of `rayllm serve` (without host and port, which are Serve's)."""
    return build_app(args)
