"""What a model needs of a rank's memory, from its spec and the settings alone: known before anything is loaded. Plain
Python: no torch is imported. `rayllm plan` shows it. Workers use the same numbers, but measure what a step takes on a
GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from rayllm.config import ResolvedConfig
from rayllm.kv_layout import KVSpan, kv_groups, kv_parts, kv_spans, max_tokens_in, num_blocks_for
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
    """An estimate of what one step allocates: the widest layer's intermediates and the logits. On a GPU, workers
    measure it when they start."""
    kv_per_token: int
    """All layers together."""
    kv_per_block: int
    """Of the tokens of a block in the layers of one KV group."""
    kv_spans: tuple[KVSpan, ...]
    """Which blocks a sequence holds in each group."""

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
        groups = kv_groups(spec)
        logits = max_num_seqs * spec.vocab_size * 4 * 3
        return cls(
            weights=num_parameters(spec, layout) * itemsize,
            activations=max_num_batched_tokens * spec.max_activation_width(layout.tp) * 4 * itemsize + logits,
            kv_per_token=kv_bytes_per_token(spec, layout.tp, itemsize),
            kv_per_block=block_size * kv_bytes_per_token(spec, layout.tp, itemsize, kv_parts(groups)),
            kv_spans=kv_spans(
                [group.window for group in groups],
                block_size=block_size,
                max_model_len=spec.max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                max_inflight_steps=layout.max_inflight_steps,
            ),
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

    def num_blocks(self, num_tokens: int) -> int:
        """KV blocks that a sequence of so many tokens holds at most at a time."""
        return num_blocks_for(self.kv_spans, num_tokens)

    def max_tokens(self, num_blocks: int, limit: int) -> int:
        """Tokens of the longest sequence, up to `limit`, that so many blocks hold."""
        return max_tokens_in(self.kv_spans, num_blocks, limit)


def kv_bytes_per_token(spec: DecoderSpec, tp_size: int, itemsize: int, layers: Iterable[int] | None = None) -> int:
    """What a rank keeps of a token in these layers, or in all together."""
    layers = range(spec.num_layers) if layers is None else layers
    shapes = (spec.layers[layer].attention.kv_shape(tp_size) for layer in layers)
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
    fits = max_tokens_in(config.kv_spans(), num_blocks, config.max_model_len)
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
