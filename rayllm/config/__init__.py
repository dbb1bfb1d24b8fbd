"""The configs, for Python, YAML and the command line alike. Frozen; unknown keys are errors that name the nearest.

`EngineConfig` and `ServerConfig` are what a user says. What follows from them together with the model and the machine
is worked out once, by `engine.owner.resolve`, into a `ResolvedConfig`: nothing is looked up or defaulted after that.
"""

from rayllm.config.devices import count_cores, count_gpus
from rayllm.config.engine import (
    DEFAULT_ENGINE_NAME,
    RAY_NAMESPACE,
    Backend,
    ContentFormat,
    Device,
    Dtype,
    EngineConfig,
    LoadFormat,
    ReasoningParser,
    Standby,
    ToolCallParser,
)
from rayllm.config.environment import Environment
from rayllm.config.generation import GENERATION_FIELDS, GenerationDefaults
from rayllm.config.resolved import ModelShape, ResolvedConfig
from rayllm.config.server import HttpProxy, ServerConfig
from rayllm.config.settings import parse_settings

__all__ = [
    "DEFAULT_ENGINE_NAME",
    "GENERATION_FIELDS",
    "RAY_NAMESPACE",
    "Backend",
    "ContentFormat",
    "Device",
    "Dtype",
    "EngineConfig",
    "Environment",
    "GenerationDefaults",
    "HttpProxy",
    "LoadFormat",
    "ModelShape",
    "ReasoningParser",
    "ResolvedConfig",
    "ServerConfig",
    "Standby",
    "ToolCallParser",
    "count_cores",
    "count_gpus",
    "parse_settings",
]
