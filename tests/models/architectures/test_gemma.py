from __future__ import annotations

from pathlib import Path

import pytest
from golden import check_against_transformers
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from tiny import make_checkpoint
from transformers import GemmaConfig

from rayllm.errors import ConfigError
from rayllm.models.architectures import gemma
from rayllm.spec import NormSpec

TINY = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 24, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip


def test_log_probabilities_equal_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(make_checkpoint(tmp_path, GemmaConfig(**TINY), tokenizer=False), two_ranks)


def test_norms_are_zero_centered_and_embeddings_scaled_and_tied() -> None:
    spec = gemma.spec({**CONFIG, "hidden_act": "gelu"})
    assert spec.final_norm == spec.layers[0].norm == NormSpec("rms", 1e-5, zero_centered=True)
    assert (spec.embedding_scale, spec.tied_embeddings, spec.layers[0].attention.head_dim) == (8.0, True, 256)
    assert spec.layers[0].feed_forward.activation == "gelu_tanh"


def test_attention_in_both_directions_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_bidirectional_attention=True is not supported"):
        gemma.spec({**CONFIG, "use_bidirectional_attention": True})
