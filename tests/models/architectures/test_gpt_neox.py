from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_against_transformers
from ranks import RankPool
from safetensors.torch import load_file, save_file
from teacher import load
from tiny import make_checkpoint
from transformers import GPTNeoXConfig

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import gpt_neox
from rayllm.spec import RopeSpec

TINY: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 283,
    "max_position_embeddings": 512, "rotary_pct": 0.5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "one after the other": {"use_parallel_residual": False},
    "tied, without biases": {
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rotary_emb_base": 500,
        "hidden_act": "gelu_fast",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers(variant: str, tmp_path: Path, two_ranks: RankPool) -> None:
    config = GPTNeoXConfig(**{**TINY, **VARIANTS[variant]})
    check_against_transformers(make_checkpoint(tmp_path, config, tokenizer=False), two_ranks)


def test_the_rotation_has_names_of_its_own_in_older_files() -> None:
    assert gpt_neox.spec(TINY).layers[0].attention.rope == RopeSpec(10_000.0, 8)
    old = gpt_neox.spec({**TINY, "rotary_emb_base": 1e6, "rotary_pct": 1.0, "rope_scaling": None})
    assert old.layers[0].attention.rope == RopeSpec(1e6, 16)
    new = gpt_neox.spec({**TINY, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}})
    assert new.layers[0].attention.rope == RopeSpec(5e5, 4)


@pytest.mark.parametrize("fields", [{"rotary_emb_base": 0}, {"rotary_pct": 2}, {"num_attention_heads": 5}], ids=str)
def test_a_bad_value_is_refused_by_the_name_in_the_file(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        gpt_neox.spec({**TINY, **fields})


def test_masks_in_older_files_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_checkpoint(tmp_path, GPTNeoXConfig(**TINY), tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.0.attention.{name}"] = torch.zeros(1)
    save_file(tensors, path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load(TensorParallel(), path)
    assert not caplog.records
