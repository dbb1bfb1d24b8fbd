"""What a model needs of a rank's memory, from its spec and the settings alone: known before anything is loaded. Plain
Python: no torch is imported. `rayllm plan` shows it, and the workers use the same numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

from rayllm.config import ResolvedConfig
from rayllm.layout import ParallelLayout
from rayllm.models.parameters import num_parameters
from rayllm.spec import DecoderSpec

log = logging.getLogger(__name__)

LEAST_CONTEXT = 256
"""Tokens below which a context that nobody asked for is not shortened."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_SHARE = 0.4
"""Share of a machine's available memory that all CPU workers together may fill with KV."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Of one rank, in bytes."""

    weights: int
    activations: int
    """A bound for what one step allocates: the widest layer's intermediates and the logits."""
    kv_per_token: int
    """All layers together."""
    block_size: int
    """Tokens of a KV block."""

    @classmethod
    def of(
        cls,
        spec: DecoderSpec,
        layout: ParallelLayout,
        *,
        dtype: str,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> MemoryNeeds:
        itemsize = DTYPE_BYTES[dtype]
        logits = max_num_seqs * spec.vocab_size * 4 * 3
        return cls(
            weights=num_parameters(spec, layout) * itemsize,
            activations=max_num_batched_tokens * spec.max_activation_width(layout.tp) * 4 * itemsize + logits,
            kv_per_token=kv_bytes_per_token(spec, layout.tp, itemsize),
            block_size=block_size,
        )

    @classmethod
    def of_config(cls, config: ResolvedConfig) -> MemoryNeeds:
        return cls.of(
            config.spec,
            config.engine.layout,
            dtype=config.dtype,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
        )

    @cached_property
    def kv_per_block(self) -> int:
        return self.kv_per_token * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """KV blocks of a sequence of so many tokens."""
        return -(-num_tokens // self.block_size)


def kv_bytes_per_token(spec: DecoderSpec, tp_size: int, itemsize: int) -> int:
    """What a rank keeps of a token, all layers together."""
    shapes = (attention.kv_shape(tp_size) for attention in spec.attentions())
    return itemsize * sum(num_heads * sum(widths) for num_heads, widths in shapes)


def kv_budget(config: ResolvedConfig, needs: MemoryNeeds, device_bytes: int) -> int:
    """Bytes of KV that a rank has room for, never negative. `device_bytes`: memory that is free for the engine before
    it starts: of the rank's GPU, in all; of the machine, for all CPU ranks together.

    `num_kv_blocks` and `kv_cache_memory_bytes` win where they are set.
    """
    engine = config.engine
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks * needs.kv_per_block
    if engine.kv_cache_memory_bytes is not None:
        return engine.kv_cache_memory_bytes
    if config.device == "cuda":
        budget = int(device_bytes * engine.gpu_memory_utilization) - needs.weights - needs.activations
    else:
        num_ranks = engine.layout.num_ranks
        budget = int((device_bytes - num_ranks * needs.weights) * CPU_KV_SHARE) // num_ranks
    return max(0, budget)


def least_context(asked: int | None, max_model_len: int) -> int:
    """Tokens that a sequence must be able to have: `max_model_len`, where that was asked for."""
    return max_model_len if asked is not None else min(LEAST_CONTEXT, max_model_len)


def fit_context(config: ResolvedConfig, num_blocks: int) -> ResolvedConfig:
    """The config of an engine whose workers hold `num_blocks` KV blocks: where no `max_model_len` was asked for, with
    the longest context that fits."""
    fits = num_blocks * config.block_size
    if config.engine.max_model_len is not None or config.max_model_len <= fits:
        return config
    log.warning(
        "max_model_len is %d, what the KV cache holds; the model's context is %d tokens. Set max_model_len, or give "
        "the KV cache more memory, to choose otherwise",
        fits,
        config.max_model_len,
    )
    fitted: ResolvedConfig = config.model_copy(update={"max_model_len": fits})
    return fitted
