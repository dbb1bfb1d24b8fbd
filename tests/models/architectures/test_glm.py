from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from tiny import make_checkpoint
from transformers import GlmConfig

from rayllm.models.architectures import glm
from rayllm.spec import NormSpec, RopeSpec

TINY: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "num_hidden_layers": 2, "vocab_size": 288, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"attention_bias": False, "partial_rotary_factor": 0.25}], ids=str)
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(make_checkpoint(tmp_path, GlmConfig(**TINY, **fields), tokenizer=False), two_ranks)


def test_half_of_each_head_turns_in_pairs_where_the_config_is_silent() -> None:
    fields = ("num_key_value_heads", "rms_norm_eps", "hidden_act")
    spec = glm.spec({name: value for name, value in CONFIG.items() if name not in fields})
    attention = spec.layers[0].attention
    assert attention.rope == RopeSpec(10_000.0, 64, in_pairs=True)
    assert (attention.head_dim, attention.num_kv_heads) == (128, 2)
    assert (attention.qkv_bias, attention.out_bias) == (True, False)
    assert spec.final_norm == NormSpec("rms", 1.5625e-7)
    assert spec.max_model_len == 131_072


def test_the_share_that_turns_stands_in_rope_parameters_too() -> None:
    parameters = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}
    assert glm.spec({**CONFIG, "rope_parameters": parameters}).layers[0].attention.rope == RopeSpec(
        5e6, 32, in_pairs=True
    )
