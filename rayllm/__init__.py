"""RayLLM: the LLM inference engine that is native to Ray.

The public names are loaded when first used, so that `import rayllm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayllm.async_llm import AsyncLLM
    from rayllm.config import EngineConfig
    from rayllm.engine.client.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from rayllm.llm import LLM
    from rayllm.models.registry import register_architecture
    from rayllm.remote import connect, get_engine
    from rayllm.request import (
        CompletionOutput,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
        TextPrompt,
        TokensPrompt,
    )

__version__ = "0.1.0"

_HOMES = {
    "LLM": "rayllm.llm",
    "AsyncLLM": "rayllm.async_llm",
    "connect": "rayllm.remote",
    "get_engine": "rayllm.remote",
    "EngineConfig": "rayllm.config",
    "BeamSearchOutput": "rayllm.engine.client.beam_search",
    "BeamSearchParams": "rayllm.engine.client.beam_search",
    "BeamSearchSequence": "rayllm.engine.client.beam_search",
    "SamplingParams": "rayllm.request",
    "RequestOutput": "rayllm.request",
    "CompletionOutput": "rayllm.request",
    "StructuredOutputsParams": "rayllm.request",
    "TextPrompt": "rayllm.request",
    "TokensPrompt": "rayllm.request",
    "register_architecture": "rayllm.models.registry",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
    "connect",
    "get_engine",
    "register_architecture",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rayllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
