from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from fakes import fake_config, fake_spec

from rayllm.config import ResolvedConfig
from rayllm.spec import (
    ClampedSwiglu,
    ExpertSpec,
    LatentAttentionSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    SparseMlpSpec,
)


def test_a_resolved_config_brings_its_spec_to_another_process() -> None:
    layer = fake_spec().layers[0]
    attention = replace(layer.attention, rope=RopeSpec(1e4, 16, "yarn", factor=4.0), window=7, alibi_slopes=(0.5, 0.25))
    router = RouterSpec(8, 2, "sigmoid", renormalize=True, num_groups=2, group_score="top2_sum")
    sparse = SparseMlpSpec(router, ExpertSpec(32, ClampedSwiglu(1.702, 7.0)), MlpSpec(64, "silu", gated=True))
    others = (replace(layer, attention=attention, parallel=True), replace(layer, feed_forward=sparse))
    spec = replace(fake_spec(), layers=(layer, *others))
    config = fake_config(spec=spec)
    assert config.spec is spec
    assert ResolvedConfig.model_validate_json(config.model_dump_json()).spec == spec
    assert pickle.loads(pickle.dumps(config)).spec == spec


LATENT = LatentAttentionSpec(
    4, 16, 24, 32, 0.25, NormSpec("rms", 1e-6), RopeSpec(1e4, 8, in_pairs=True), q_latent_dim=20
)


def test_each_kind_of_layer_comes_as_itself() -> None:
    layer = fake_spec().layers[0]
    layers = (layer, replace(layer, attention=LATENT), replace(layer, attention=replace(LATENT, q_latent_dim=None)))
    config = fake_config(spec=replace(fake_spec(), layers=layers))
    assert ResolvedConfig.model_validate_json(config.model_dump_json()).spec.layers == layers


def test_the_widest_of_latent_attention_are_queries_in_the_latent_space() -> None:
    layer = replace(fake_spec().layers[0], attention=LATENT)
    spec = replace(fake_spec(), layers=(layer,))
    projected, absorbed, sums = 16 + 8, 32 + 8, 32
    assert [spec.max_activation_width(size) for size in (1, 2)] == [
        4 * (projected + absorbed + sums), 2 * (projected + absorbed + sums),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "gated", "tp_size", "expected"),
    [(16, False, 1, 128), (512, False, 1, 512), (512, True, 1, 1024), (512, True, 4, 256), (512, True, 64, 64)],
)
def test_the_widest_activation_is_the_largest_of_residual_heads_and_feed_forward(
    inner: int, gated: bool, tp_size: int, expected: int
) -> None:
    """The residual is 64 wide, queries, keys and values together are 128; a rank has its share of all but the first."""
    layer = fake_spec().layers[0]
    layers = (replace(layer, feed_forward=MlpSpec(inner, "silu", gated)),) * 2
    assert replace(fake_spec(), layers=layers).max_activation_width(tp_size) == expected


@pytest.mark.parametrize(("inner", "expected"), [(8, 3 * 64), (128, 3 * 2 * 128)])
def test_a_sparse_layer_is_as_wide_as_the_rows_of_all_experts_that_a_token_takes(inner: int, expected: int) -> None:
    sparse = SparseMlpSpec(RouterSpec(8, 3, "softmax", renormalize=True), ExpertSpec(inner, "silu"))
    layers = (replace(fake_spec().layers[0], feed_forward=sparse),)
    assert replace(fake_spec(), layers=layers).max_activation_width(2) == expected
