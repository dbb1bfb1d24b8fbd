"""The built-in chat model: a few megabytes that ship with RayLLM, and the code that trained them.

Importing this package is light: torch and transformers are needed by `rayllm.demo.train` alone.
"""

from pathlib import Path

DEMO_MODEL_NAME = "rayllm-demo"


def model_path() -> Path:
    """The folder of the committed checkpoint (config, tokenizer, safetensors)."""
    return Path(__file__).resolve().parent / "model"
