from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import fake_config, fake_spec

from rayllm.errors import ConfigError
from rayllm.models.memory_plan import MemoryNeeds
from rayllm.runner import memory
from rayllm.runner.memory import check_weights_fit, leaves_room_to_memory, measure_step_bytes, plan_num_blocks

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


class _Gpu:
    """Memory of a GPU of 100 GiB, as `torch.cuda` tells it: 3 GiB are others', the rest is reserved by this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reserved = self.peak = 20.0
        self.cached = 1.5
        """Of what is reserved."""
        for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_reserved", "memory_reserved", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)

    def take(self, gib: float) -> None:
        self.reserved += gib
        self.peak = max(self.peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved, self.cached = self.reserved - self.cached, 0.0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.reserved

    def max_memory_reserved(self, device: torch.device) -> int:
        return int(self.peak * 2**30)

    def memory_reserved(self, device: torch.device) -> int:
        return int(self.reserved * 2**30)

    def synchronize(self, device: torch.device) -> None:
        pass

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return int((97 - self.reserved) * 2**30), 100 * 2**30


def test_a_gpus_kv_cache_gets_what_the_largest_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = _Gpu(monkeypatch), torch.device("cuda")
    config = fake_config(device="cuda", engine={"gpu_memory_utilization": 0.9}, max_num_seqs=10**6)

    def step() -> None:
        gpu.take(7.0)
        gpu.cached = 5.0  # the other two are tables that stay

    step_bytes = measure_step_bytes(config, device, step)
    assert step_bytes == 5 * 2**30
    held = 18.5 + 2 + 3
    room = plan_num_blocks(config, replace(needs(2**20), kv_per_block=2**20), device, step_bytes)
    assert room == (90 - held - 5) * 2**10


def test_a_step_that_does_not_fit_is_refused_with_what_makes_it_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    _Gpu(monkeypatch)

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=64 .* max_num_seqs=8 .* lower either.*9 GiB"):
        measure_step_bytes(fake_config(device="cuda"), torch.device("cuda"), step)


def test_memory_is_measured_where_nobody_said_how_much_the_cache_gets() -> None:
    assert leaves_room_to_memory(fake_config())
    assert not leaves_room_to_memory(fake_config(engine={"num_kv_blocks": 7}))
    assert not leaves_room_to_memory(fake_config(engine={"kv_cache_memory_bytes": 10**6}))
