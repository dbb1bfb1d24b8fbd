from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from fakes import fake_config, fake_spec

from rayllm.config import ResolvedConfig
from rayllm.spec import MlpSpec, RopeSpec


def test_a_resolved_config_brings_its_spec_to_another_process() -> None:
    layer = fake_spec().layers[0]
    attention = replace(layer.attention, rope=RopeSpec(1e4, 16, "yarn", factor=4.0), window=7, alibi_slopes=(0.5, 0.25))
    spec = replace(fake_spec(), layers=(layer, replace(layer, attention=attention, parallel=True)))
    config = fake_config(spec=spec)
    assert config.spec is spec
    assert ResolvedConfig.model_validate_json(config.model_dump_json()).spec == spec
    assert pickle.loads(pickle.dumps(config)).spec == spec


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
