"""Tiny random checkpoints of mixtures of experts whose router's choices are spread and whose biases are not zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import make_model

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}


def make_mixture(path: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the model of a `transformers` config: each expert of its own, buffers of routers spread like biases."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = make_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(path)
    return path
