from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import fake_config, fake_spec

from rayllm.errors import ConfigError
from rayllm.models.memory_plan import MemoryNeeds
from rayllm.runner import memory
from rayllm.runner.memory import check_weights_fit, plan_num_blocks

CPU = torch.device("cpu")


def needs(kv_per_token: int) -> MemoryNeeds:
    spans = fake_config().kv_spans()
    return MemoryNeeds(
        weights=0, activations=0, kv_per_token=kv_per_token, kv_per_block=4 * kv_per_token, kv_spans=spans
    )


def test_weights_that_no_memory_holds_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 2**30)
    large = replace(needs(1), weights=3 * 2**30)
    with pytest.raises(ConfigError, match=r"3\.0 GiB per worker, and 1\.0 GiB .* 'rayllm plan'"):
        check_weights_fit(fake_config(), large, CPU)
    check_weights_fit(fake_config(), needs(1), CPU)


def test_the_number_of_blocks_asked_for_is_taken() -> None:
    assert plan_num_blocks(fake_config(engine={"num_kv_blocks": 77}), needs(250), CPU) == 77


def test_memory_asked_for_is_cut_into_blocks() -> None:
    config = fake_config(engine={"kv_cache_memory_bytes": 50_999})
    assert plan_num_blocks(config, needs(250), CPU) == 50


def test_the_ranks_of_a_machine_share_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1_000_000)
    alone = plan_num_blocks(fake_config(), needs(1000), CPU)
    shared = plan_num_blocks(fake_config(engine={"tensor_parallel_size": 2}), needs(1000), CPU)
    assert (alone, shared) == (100, 50)


def test_no_more_blocks_than_all_sequences_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 10**12)
    assert plan_num_blocks(fake_config(), needs(1000), CPU) == 8 * 128 // 4


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused_with_the_one_that_does() -> None:
    config = fake_config(engine={"kv_cache_memory_bytes": 20_000, "max_model_len": 128})
    with pytest.raises(
        ConfigError, match=r"max_model_len=128 .* lower max_model_len to 80, or raise kv_cache_memory_bytes"
    ):
        plan_num_blocks(config, needs(250), CPU)


def test_a_context_that_nobody_asked_for_may_become_shorter_down_to_a_limit() -> None:
    config = fake_config(engine={"kv_cache_memory_bytes": 80_000}, max_model_len=512)
    assert plan_num_blocks(config, needs(250), CPU) == 80
    with pytest.raises(ConfigError, match=r"max_model_len=512 .* lower max_model_len to 80, or raise"):
        plan_num_blocks(config, needs(1000), CPU)


def test_a_window_needs_blocks_for_what_it_keeps_alone() -> None:
    config = fake_config(
        spec=fake_spec(windows=(9, 9)), max_num_batched_tokens=8, engine={"kv_cache_memory_bytes": 20_000}
    )
    windowed = MemoryNeeds.of_config(config)
    per_sequence = (8 + 8) // 4 + 1  # the window's tokens before a step, the step's, and a block for odd ends
    assert [windowed.num_blocks(num_tokens) for num_tokens in (1, 8, 100, 4096)] == [1, 2, per_sequence, per_sequence]
    few = replace(windowed, kv_per_block=1000)
    assert plan_num_blocks(config, few, CPU) == 20, "128 tokens need 32 blocks without the window"
    assert plan_num_blocks(config.model_copy(update={"max_num_seqs": 2}), few, CPU) == 2 * per_sequence
    assert [windowed.max_tokens(num_blocks, 4096) for num_blocks in (0, 3, 4, 5)] == [0, 12, 16, 4096]
