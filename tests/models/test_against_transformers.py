"""Every architecture gives the log-probabilities that `transformers` gives, however the work is cut or split."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import (
    BLOCK_SIZE,
    CUTS,
    TOLERANCE,
    check_against_transformers,
    largest_difference,
    make_sequences,
    transformers_log_probs,
)
from ranks import RankPool
from teacher import load, log_probs, log_probs_of_folder
from tiny import make_checkpoint

from rayllm.distributed.groups import TensorParallel


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama odd vocabulary": ("llama", {"vocab_size": 263}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    "llama tanh gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama all kv heads": ("llama", {"num_key_value_heads": 4}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama linear rope": ("llama", _rope("linear", factor=4.0)),
    "llama3 rope": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama yarn": ("llama", _rope("yarn", factor=16.0, original_max_position_embeddings=32)),
    "mistral": ("mistral", {}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied odd vocabulary": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 271}),
    "qwen2 window above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "opt": ("opt", {}),
    "opt tied": ("opt", {"tie_word_embeddings": True, "activation_function": "gelu"}),
    "opt norm last": ("opt", {"do_layer_norm_before": False}),
    "opt no biases": ("opt", {"enable_bias": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers_however_the_work_is_cut_and_split(
    variant: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    architecture, overrides = VARIANTS[variant]
    path = make_checkpoint(tmp_path, architecture, tokenizer=False, **overrides)
    check_against_transformers(path, two_ranks)


def test_expected_log_probabilities_are_not_flat(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, tokenizer=False)
    expected = transformers_log_probs(path, make_sequences(288))
    assert np.exp(expected[0]).max(axis=-1).mean() > 10 / 288


def test_a_window_longer_than_a_tile_of_keys_equals_transformers(tmp_path: Path) -> None:
    overrides = {"sliding_window": 9, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    path = make_checkpoint(tmp_path, "mistral", tokenizer=False, **overrides)
    draw = random.Random(3)
    tokens = [draw.randrange(288) for _ in range(1300)]
    expected = transformers_log_probs(path, [tokens])
    decoder = load(TensorParallel(), path)
    for chunk in (1300, 700):
        found = [part.numpy() for part in log_probs(decoder, [tokens], [chunk], 16)]
        assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("scaling", ["llama3", "yarn", "linear", "default", "dynamic"])
def test_old_rope_scaling_fields_mean_the_same_as_rope_parameters(scaling: str, tmp_path: Path) -> None:
    import json

    overrides = {"llama3": "llama3 rope", "yarn": "llama yarn", "linear": "llama linear rope"}.get(scaling)
    path = make_checkpoint(tmp_path, tokenizer=False, **(VARIANTS[overrides][1] if overrides else {}))
    sequences = make_sequences(288)
    expected = transformers_log_probs(path, sequences)
    config = json.loads((path / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    config["rope_scaling"] = parameters if overrides else None
    if scaling == "dynamic":
        config["rope_scaling"] = {"type": "dynamic", "factor": 4.0}
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    found = log_probs_of_folder(TensorParallel(), str(path), sequences, CUTS[-1:], BLOCK_SIZE)[0]
    assert largest_difference(found, expected) < TOLERANCE


def test_dummy_weights_are_the_same_whatever_the_number_of_ranks(tmp_path: Path, two_ranks: RankPool) -> None:
    path = make_checkpoint(tmp_path, tokenizer=False, vocab_size=263)
    (path / "model.safetensors").unlink()
    sequences = make_sequences(263)
    alone = log_probs_of_folder(TensorParallel(), str(path), sequences, CUTS[-1:], BLOCK_SIZE, "dummy")[0]
    split, _ = two_ranks.run(log_probs_of_folder, str(path), sequences, CUTS[-1:], BLOCK_SIZE, "dummy")
    assert largest_difference(split[0], alone) < TOLERANCE
    assert np.exp(alone[0]).max(axis=-1).mean() > 5 / 263, "dummy logits are flat"
