"""The memory plan: how many KV blocks a worker can hold beside weights and activations."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError
from rayllm.models.memory_plan import CPU_KV_SHARE, MemoryNeeds, least_context


def plan_num_blocks(config: ResolvedConfig, needs: MemoryNeeds, device: torch.device) -> int:
    """KV blocks for this worker, called when the weights are loaded.

    The user's setting (`num_kv_blocks`, `kv_cache_memory_bytes`) wins; else what `gpu_memory_utilization` leaves on the
    GPU, or a share of the machine's available memory. Never more than `max_num_seqs` full sequences could use.
    Raises `ConfigError` where not even one sequence of `max_model_len` fits; where that is left open, the context
    becomes shorter instead (`memory_plan.fit_context`).
    """
    engine = config.engine
    blocks_per_sequence = needs.num_blocks(config.max_model_len)
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * engine.gpu_memory_utilization) - (total - free) - needs.activations
    else:
        budget = int(available_host_bytes() * CPU_KV_SHARE) // engine.layout.num_ranks
    num_blocks = min(budget // needs.kv_per_block, blocks_per_sequence * config.max_num_seqs)
    if num_blocks < needs.num_blocks(least_context(engine.max_model_len, config.max_model_len)):
        fits = max(0, num_blocks) * config.block_size
        needed = blocks_per_sequence * needs.kv_per_block / 2**20
        raise ConfigError(
            f"max_model_len={config.max_model_len} needs {needed:.0f} MiB of KV cache per worker, but "
            f"{max(0, budget) / 2**20:.0f} MiB are available: lower max_model_len to "
            f"{fits}, or raise " + ("gpu_memory_utilization" if device.type == "cuda" else "kv_cache_memory_bytes")
        )
    return num_blocks


def available_host_bytes() -> int:
    """Memory that can still be taken here without swapping, in bytes: what the host has (`MemAvailable`), but no more
    than the container may."""
    host = _lines_of(Path("/proc/meminfo")).get("MemAvailable:")
    if host is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    container = container_bytes()
    return host * 1024 if container is None else min(host * 1024, container)


def container_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this container's limit leaves, in bytes; None without a limit. Files in memory that the kernel may drop do
    not count as used, as with Kubernetes (https://docs.kernel.org/admin-guide/cgroup-v2.html, and v1 before it)."""
    for limit, used, folder, droppable in (
        ("memory.max", "memory.current", root, "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", root / "memory", "total_inactive_file"),
    ):
        try:
            limit_bytes, used_bytes = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        dropped_bytes = _lines_of(folder / "memory.stat").get(droppable, 0)
        return max(0, limit_bytes - used_bytes + dropped_bytes)
    return None


def _lines_of(file: Path) -> dict[str, int]:
    """Each line's name and number."""
    try:
        lines = [line.split() for line in file.read_text("ascii").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
