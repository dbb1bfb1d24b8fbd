"""The memory plan: how many KV blocks a worker can hold beside weights and activations."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError
from rayllm.machine.memory import available_host_bytes
from rayllm.models.memory_plan import CPU_KV_SHARE, MemoryNeeds, least_context

log = logging.getLogger(__name__)


def check_weights_fit(config: ResolvedConfig, needs: MemoryNeeds, device: torch.device) -> None:
    """Raises `ConfigError`, before anything is loaded, where this worker's weights alone are too large."""
    if device.type == "cuda":
        room, what = _gpu_room(config, device), "GPU's"
    else:
        room, what = available_host_bytes(), "machine's"
    if needs.weights > room:
        raise ConfigError(
            f"the weights take {needs.weights / 2**30:.1f} GiB per worker, and {max(0, room) / 2**30:.1f} GiB of the "
            f"{what} memory may be used: 'rayllm plan' shows what would fit (more ranks, a smaller dtype)"
        )


def leaves_room_to_memory(config: ResolvedConfig) -> bool:
    """Whether the KV cache gets what memory there is, because nobody said how much."""
    return config.engine.num_kv_blocks is None and config.engine.kv_cache_memory_bytes is None


def measure_step_bytes(config: ResolvedConfig, device: torch.device, compute_step: Callable[[], None]) -> int:
    """GPU memory that the largest step (`compute_step`) takes while it is computed, beside what is held between steps.
    What the step made for good (tables, workspaces, NCCL's buffers) is held, and no longer free. Raises `ConfigError`
    where it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        compute_step()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_num_batched_tokens={config.max_num_batched_tokens} tokens with "
            f"max_num_seqs={config.max_num_seqs} does not fit on the GPU beside the weights: lower either, or share "
            f"the model by more ranks ({' '.join(str(error).split())})"
        ) from error
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    step_bytes = max(0, peak - torch.cuda.memory_reserved(device))
    log.info("the largest step takes %.2f GiB beside weights and KV cache", step_bytes / 2**30)
    return step_bytes


def plan_num_blocks(config: ResolvedConfig, needs: MemoryNeeds, device: torch.device, step_bytes: int = 0) -> int:
    """KV blocks for this worker, called when the weights are loaded and, on a GPU, `step_bytes` are measured.

    The user's setting (`num_kv_blocks`, `kv_cache_memory_bytes`) wins; else what `gpu_memory_utilization` leaves on the
    GPU beside a step, or a share of the machine's available memory. Never more than `max_num_seqs` full sequences could
    use. Raises `ConfigError` where not even one sequence of `max_model_len` fits; where that is left open, the context
    becomes shorter instead (`memory_plan.fit_context`).
    """
    engine = config.engine
    blocks_per_sequence = needs.num_blocks(config.max_model_len)
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks
    if engine.kv_cache_memory_bytes is not None:
        budget = engine.kv_cache_memory_bytes
    elif device.type == "cuda":
        budget = _gpu_room(config, device) - step_bytes
    else:
        budget = int(available_host_bytes() * CPU_KV_SHARE) // engine.layout.num_ranks
    num_blocks = min(budget // needs.kv_per_block, blocks_per_sequence * config.max_num_seqs)
    if num_blocks < needs.num_blocks(least_context(engine.max_model_len, config.max_model_len)):
        fits = needs.max_tokens(num_blocks, config.max_model_len)
        needed = blocks_per_sequence * needs.kv_per_block / 2**20
        raise ConfigError(
            f"max_model_len={config.max_model_len} needs {needed:.0f} MiB of KV cache per worker, but "
            f"{max(0, budget) / 2**20:.0f} MiB are available: lower max_model_len to "
            f"{fits}, or raise " + ("gpu_memory_utilization" if device.type == "cuda" else "kv_cache_memory_bytes")
        )
    return num_blocks


def _gpu_room(config: ResolvedConfig, device: torch.device) -> int:
    """Bytes of its GPU that this worker may still take; negative where others have taken them."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.engine.gpu_memory_utilization) - (total - free)
