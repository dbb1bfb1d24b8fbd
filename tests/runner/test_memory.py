from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import fake_config

from rayllm.errors import ConfigError
from rayllm.models.memory_plan import MemoryNeeds
from rayllm.runner import memory
from rayllm.runner.memory import plan_num_blocks

CPU = torch.device("cpu")


def needs(kv_per_token: int) -> MemoryNeeds:
    return MemoryNeeds(weights=0, activations=0, kv_per_token=kv_per_token, block_size=4)


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


def test_this_host_has_memory() -> None:
    assert memory.available_host_bytes() > 2**20


@pytest.mark.parametrize(
    ("folder", "limit", "used", "droppable"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, folder: str, limit: str, used: str, droppable: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    assert memory.container_bytes(tmp_path) is None
    (tmp_path / folder / limit).write_text("1000000\n")
    (tmp_path / folder / used).write_text("700000\n")
    assert memory.container_bytes(tmp_path) == 300_000
    (tmp_path / folder / "memory.stat").write_text(f"anon 500000\n{droppable} 200000\n")
    assert memory.container_bytes(tmp_path) == 500_000


def test_a_container_without_a_limit_has_all(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    assert memory.container_bytes(tmp_path) is None


def test_the_lesser_of_host_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available_host_bytes()
    monkeypatch.setattr(memory, "container_bytes", lambda: 12345)
    assert memory.available_host_bytes() == 12345
    monkeypatch.setattr(memory, "container_bytes", lambda: 2 * whole + 2**40)
    assert memory.available_host_bytes() < 2 * whole
