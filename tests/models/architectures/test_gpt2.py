from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import BLOCK_SIZE, CUTS, check_against_transformers, largest_difference, make_sequences
from ranks import RankPool
from safetensors.torch import load_file, save_file
from teacher import load, log_probs
from tiny import make_checkpoint
from transformers import GPT2Config

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import gpt2
from rayllm.spec import MlpSpec, PositionsSpec

TINY: dict[str, Any] = {
    "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 283, "n_positions": 256, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "scaled by layer, narrow": {
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 96,
    },
    "not scaled, own head": {"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers(variant: str, tmp_path: Path, two_ranks: RankPool) -> None:
    config = GPT2Config(**{**TINY, **VARIANTS[variant]})
    check_against_transformers(make_checkpoint(tmp_path, config, tokenizer=False), two_ranks)


def test_names_without_a_prefix_and_masks_are_read_as_in_the_files_of_the_first_release(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(tmp_path, GPT2Config(**TINY), tokenizer=False)
    sequences = make_sequences(283)
    expected = [part.numpy() for part in log_probs(load(TensorParallel(), path), sequences, CUTS[0], BLOCK_SIZE)]
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path / "model.safetensors").items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(
        {**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)},
        path / "model.safetensors",
    )
    with caplog.at_level(logging.WARNING):
        model = load(TensorParallel(), path)
    assert not caplog.records
    found = [part.numpy() for part in log_probs(model, sequences, CUTS[0], BLOCK_SIZE)]
    assert largest_difference(found, expected) == 0


def test_what_the_config_leaves_out_is_as_published() -> None:
    spec = gpt2.spec({"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100})
    assert spec.positions == PositionsSpec(1024, offset=0)
    assert spec.max_model_len == 1024
    assert spec.layers[0].feed_forward == MlpSpec(256, "gelu_tanh", gated=False, bias=True)
    assert spec.tied_embeddings


@pytest.mark.parametrize(
    "fields",
    [{"add_cross_attention": True}, {"n_head": 5}, {"reorder_and_upcast_attn": "yes"}, {"n_inner": 0}],
    ids=str,
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        gpt2.spec({**TINY, **fields})
