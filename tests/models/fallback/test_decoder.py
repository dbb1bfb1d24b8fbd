"""Models that RayLLM has no decoder for, through `transformers`, against `transformers` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import COMMON, VOCAB_SIZE, foreign_checkpoint
from golden import (
    BLOCK_SIZE,
    CUTS,
    check_against_transformers,
    largest_difference,
    make_sequences,
    transformers_log_probs,
)
from ranks import RankPool
from teacher import log_probs
from tiny import make_checkpoint
from transformers import LlamaConfig

from rayllm.distributed.groups import TensorParallel
from rayllm.models import load_model
from rayllm.models.registry import read_spec

SPLIT: dict[str, dict[str, Any]] = {
    "olmo2": {"num_key_value_heads": 2},  # gathers queries, keys and values, whose norm spans all heads
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "attention_bias": True},
}
ALONE: dict[str, dict[str, Any]] = {
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2},
}
"""Models without a tensor-parallel plan, or served on one rank."""


@pytest.mark.parametrize("model_type", SPLIT)
def test_log_probabilities_equal_transformers(model_type: str, tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(foreign_checkpoint(tmp_path, model_type, **SPLIT[model_type]), two_ranks)


@pytest.mark.parametrize("model_type", ALONE)
def test_log_probabilities_on_one_rank_equal_transformers(model_type: str, tmp_path: Path) -> None:
    check_against_transformers(foreign_checkpoint(tmp_path, model_type, **ALONE[model_type]), None)


def test_a_native_architecture_can_be_computed_by_transformers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, LlamaConfig(**COMMON, num_key_value_heads=2), tokenizer=False)
    spec = read_spec(path, "transformers")
    model = load_model(str(path), spec, TensorParallel(), dtype=torch.float32, device=torch.device("cpu"))
    sequences = make_sequences(VOCAB_SIZE)
    found = [part.numpy() for part in log_probs(model, sequences, CUTS[-1], BLOCK_SIZE)]
    assert largest_difference(found, transformers_log_probs(path, sequences)) < 1e-4
    assert read_spec(path).transformers is None
