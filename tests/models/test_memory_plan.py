from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from fakes import fake_config, fake_spec

from rayllm.layout import ParallelLayout
from rayllm.models.memory_plan import MemoryNeeds, fit_context, kv_budget, kv_bytes_per_token, least_context
from rayllm.models.parameters import num_parameters
from rayllm.spec import GroupedAttentionSpec


def _needs(**changes: int) -> MemoryNeeds:
    spans = fake_config().kv_spans()
    needs = MemoryNeeds(weights=1000, activations=200, kv_per_token=10, kv_per_block=40, kv_spans=spans)
    return replace(needs, **changes)


def test_kv_bytes_count_keys_and_values_of_all_layers_and_heads_that_ranks_share() -> None:
    layer = replace(fake_spec().layers[0], attention=GroupedAttentionSpec(4, 2, 16, 0.25))
    spec = replace(fake_spec(), layers=(layer,) * 3)
    one = 3 * 2 * 2 * 16 * 4
    assert [kv_bytes_per_token(spec, size, 4) for size in (1, 2, 4)] == [one, one // 2, one // 2]
    assert kv_bytes_per_token(spec, 1, 2) == one // 2


def test_needs_follow_from_the_config() -> None:
    config = fake_config(dtype="bfloat16")
    needs = MemoryNeeds.of_config(config)
    assert needs.weights == 2 * num_parameters(config.spec, ParallelLayout())
    assert needs.kv_per_block == 4 * needs.kv_per_token
    assert [needs.num_blocks(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]
    assert needs.activations > config.max_num_seqs * config.spec.vocab_size * 4


def test_room_for_kv_is_what_weights_and_activations_leave() -> None:
    gpu = fake_config(device="cuda", engine={"gpu_memory_utilization": 0.5})
    assert kv_budget(gpu, _needs(), 10_000) == 5000 - 1000 - 200
    assert kv_budget(gpu, _needs(), 1000) == 0
    two_ranks = fake_config(engine={"tensor_parallel_size": 2})
    assert kv_budget(two_ranks, _needs(), 12_000) == (12_000 - 2 * 1000) * 0.4 // 2
    assert kv_budget(fake_config(engine={"kv_cache_memory_bytes": 77}), _needs(), 0) == 77
    assert kv_budget(fake_config(engine={"num_kv_blocks": 7}), _needs(), 0) == 7 * 40


def test_a_context_that_was_asked_for_is_the_least_and_another_may_shrink() -> None:
    assert least_context(4096, 4096) == 4096
    assert (least_context(None, 4096), least_context(None, 100)) == (256, 100)


def test_the_context_is_fitted_to_the_kv_cache_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = fake_config(max_model_len=1000)
    with caplog.at_level(logging.WARNING):
        assert fit_context(config, 100).max_model_len == 400
    assert "max_model_len is 400" in caplog.text
    assert "1000 tokens" in caplog.text
    assert fit_context(config, 250) is config
    asked = fake_config(max_model_len=1000, engine={"max_model_len": 1000})
    assert fit_context(asked, 100) is asked
