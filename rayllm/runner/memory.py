"""The memory plan: how many KV blocks a worker can hold beside weights and activations."""

from __future__ import annotations

import os

import torch

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError

_CPU_SHARE = 0.4
"""Share of a machine's available memory that all CPU workers together may fill with KV."""


def plan_num_blocks(config: ResolvedConfig, bytes_per_block: int, device: torch.device, activation_bytes: int) -> int:
    """KV blocks for this worker, called when the weights are loaded.

    The user's figure (`num_kv_blocks`, `kv_cache_memory_bytes`) wins; else what `gpu_memory_utilization` leaves on the
    GPU, or a share of the machine's available memory. Never more than `max_num_seqs` full sequences could use.
    Raises `ConfigError` where not even one sequence of `max_model_len` fits.
    """
    engine = config.engine
    blocks_per_sequence = -(-config.max_model_len // config.block_size)
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * engine.gpu_memory_utilization) - (total - free) - activation_bytes
    else:
        budget = int(available_host_bytes() * _CPU_SHARE) // engine.tensor_parallel_size
    num_blocks = min(budget // bytes_per_block, blocks_per_sequence * config.max_num_seqs)
    if num_blocks < blocks_per_sequence:
        fits = max(0, num_blocks) * config.block_size
        raise ConfigError(
            f"max_model_len={config.max_model_len} needs {blocks_per_sequence * bytes_per_block / 2**20:.0f} MiB of KV "
            f"cache a worker, {max(0, budget) / 2**20:.0f} MiB are there: lower max_model_len to {fits}, or raise "
            + ("gpu_memory_utilization" if device.type == "cuda" else "kv_cache_memory_bytes")
        )
    return num_blocks


def available_host_bytes() -> int:
    """Memory that can still be taken on this host without swapping (`MemAvailable`), in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
