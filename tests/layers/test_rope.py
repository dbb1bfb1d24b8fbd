from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rayllm.layers.rope import RotaryEmbedding, inverse_frequencies
from rayllm.models.config_fields import ConfigFields, read_rope
from rayllm.spec import RopeSpec

PLAIN = RopeSpec(theta=10_000.0, rotary_dim=64)


def test_frequencies_fall_from_one_by_powers_of_theta() -> None:
    found = inverse_frequencies(PLAIN)
    assert found.shape == (32,)
    assert torch.allclose(found, torch.tensor([10_000.0 ** (-i / 32) for i in range(32)]))
    assert torch.equal(inverse_frequencies(replace(PLAIN, scaling="linear", factor=4.0)), found / 4)


def test_angles_are_positions_times_frequencies_for_both_halves() -> None:
    spec = replace(PLAIN, attention_factor=1.25)
    cos, sin = RotaryEmbedding(spec, torch.float32, torch.device("cpu"))(torch.tensor([0, 3]))
    assert torch.equal(cos[:, :32], cos[:, 32:])
    assert torch.equal(cos[0], torch.full((64,), 1.25))
    assert torch.allclose(cos.square() + sin.square(), torch.full((2, 64), 1.25**2))
    assert math.isclose(float(sin[1, 1]), 1.25 * math.sin(3 * 10_000 ** (-1 / 32)), rel_tol=1e-5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    spec = replace(PLAIN, scaling="llama3", factor=8.0, original_max_positions=1024)
    plain, found = inverse_frequencies(PLAIN), inverse_frequencies(spec)
    wavelengths = 2 * math.pi / plain
    assert torch.equal(found[wavelengths < 1024 / 4], plain[wavelengths < 1024 / 4])
    assert torch.equal(found[wavelengths > 1024], plain[wavelengths > 1024] / 8)
    assert bool((found <= plain).all())
    assert bool((found >= plain / 8).all())


def test_yarn_keeps_channels_that_turn_often_and_stretches_those_that_turn_seldom() -> None:
    spec = replace(PLAIN, scaling="yarn", factor=4.0, original_max_positions=2048)
    plain, found = inverse_frequencies(PLAIN), inverse_frequencies(spec)
    turns = 2048 * plain / (2 * math.pi)
    often, seldom = turns > 1.5 * spec.beta_fast, turns < 0.5 * spec.beta_slow
    assert bool(often.any())
    assert bool(seldom.any())
    assert torch.equal(found[often], plain[often])
    assert torch.allclose(found[seldom], plain[seldom] / 4)


PAIR_FACTORS = [1.0 + 0.25 * pair for pair in range(8)]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "linear, a share": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3, nothing between": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 64,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.3, "factor": 2.0},
    "proportional, all": {"rope_type": "proportional"},
    "longrope": {
        "short_factor": PAIR_FACTORS,
        "long_factor": [2 * factor for factor in PAIR_FACTORS],
        "original_max_position_embeddings": 64,
    },
    "longrope, factors": {
        "rope_type": "longrope",
        "short_factor": PAIR_FACTORS,
        "long_factor": [2 * factor for factor in PAIR_FACTORS],
        "factor": 2.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_of_every_scaling_are_those_of_transformers(name: str) -> None:
    parameters = {"rope_theta": 5000.0, "rope_type": name, **SCALINGS[name]}
    config = LlamaConfig(head_dim=16, max_position_embeddings=512, rope_parameters=parameters)
    rope = read_rope(ConfigFields(config.to_dict()), 16, 512)
    lengths = [(64, rope)] + ([] if rope.beyond is None else [(65, rope.beyond)])
    for length, spec in lengths:
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
        assert torch.allclose(inverse_frequencies(spec), expected, rtol=1e-6, atol=0)
        assert spec.attention_factor == pytest.approx(factor, rel=1e-12)
    assert (rope.beyond is not None) == (parameters["rope_type"] == "longrope")


def test_the_pretrained_context_beside_rope_parameters_wins_as_with_transformers() -> None:
    parameters = {"rope_type": "longrope", "short_factor": PAIR_FACTORS, "long_factor": PAIR_FACTORS}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters={**parameters, "original_max_position_embeddings": 32},
    )
    rope = read_rope(ConfigFields(config.to_dict()), 16, 512)
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    assert rope.original_max_positions == 128
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_each_token_turns_as_the_length_of_its_sequence_says() -> None:
    long = replace(PLAIN, scaling="longrope", pair_factors=(4.0,) * 32, attention_factor=1.5)
    short = replace(long, pair_factors=(1.0,) * 32, attention_factor=1.25, original_max_positions=8, beyond=long)
    positions, beyond = torch.tensor([3, 3, 9]), torch.tensor([False, True, True])
    device = torch.device("cpu")
    found = RotaryEmbedding(short, torch.bfloat16, device)(positions, beyond)
    alone = [RotaryEmbedding(spec, torch.bfloat16, device)(positions) for spec in (replace(short, beyond=None), long)]
    for part, short_part, long_part in zip(found, *alone):
        assert part.dtype == torch.bfloat16
        assert torch.equal(part[0], short_part[0])
        assert torch.equal(part[1:], long_part[1:])
        assert not torch.equal(part[1], part[0])
