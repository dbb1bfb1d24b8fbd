"""Tiny checkpoints of models that RayLLM has no decoder for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import make_checkpoint
from transformers import CONFIG_MAPPING

VOCAB_SIZE = 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW: dict[str, Any] = {
    "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip
"""Of Dots1."""


def foreign_config(model_type: str, **fields: Any) -> Any:
    """A config of `transformers`."""
    kind = CONFIG_MAPPING[model_type]
    names = {name: value for name, value in COMMON.items() if name not in getattr(kind, "attribute_map", {})}
    return kind(**{**names, **fields})


def foreign_checkpoint(path: Path, model_type: str, *, tokenizer: bool = False, **fields: Any) -> Path:
    """A folder with random weights."""
    return make_checkpoint(path, foreign_config(model_type, **fields), tokenizer=tokenizer)
