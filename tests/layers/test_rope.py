from __future__ import annotations

import math
from dataclasses import replace

import torch

from rayllm.layers.rope import RotaryEmbedding, inverse_frequencies
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
