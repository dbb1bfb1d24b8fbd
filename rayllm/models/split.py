"""Whether a model can be split over ranks. Plain Python: this is known before any process starts."""

from __future__ import annotations

from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout
from rayllm.spec import DecoderSpec


def check_split(spec: DecoderSpec, layout: ParallelLayout) -> None:
    """`ConfigError` where the model's heads or feed-forward width cannot be split over the ranks of a stage."""
    tp_size = layout.tp
    for layer in spec.layers:
        heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
        inner = layer.feed_forward.intermediate_size
        if heads % tp_size or inner % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
            raise ConfigError(
                f"tensor_parallel_size={tp_size} cannot split a model with num_attention_heads={heads}, "
                f"num_key_value_heads={kv_heads}, intermediate_size={inner}; it must divide the first and the last, "
                f"and divide the second or be a multiple of it"
            )
