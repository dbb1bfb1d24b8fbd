"""What a decoder is made of, as plain data: a difference between models is a field here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayllm.layers.spec import (
    Activation,
    AttentionSpec,
    FeedForwardSpec,
    GroupedAttentionSpec,
    MlpSpec,
    NormSpec,
    PositionsSpec,
    RopeSpec,
)

__all__ = [
    "Activation",
    "AttentionSpec",
    "DecoderSpec",
    "FeedForwardSpec",
    "GroupedAttentionSpec",
    "LayerSpec",
    "MlpSpec",
    "NormPlacement",
    "NormSpec",
    "PositionsSpec",
    "RopeSpec",
]

NormPlacement = Literal["input", "sum", "output", "input_and_output"]
"""Where norms stand for both attention and feed-forward: on the input of each (Llama), on the residual sum after each
(the original Transformer), on the output of each before it is added (OLMo 2), or on input and output (Gemma 2)."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    norm_placement: NormPlacement = "input"
    parallel: bool = False
    """Attention and feed-forward both read the layer's input, and both are added to it (GPT-J, GPT-NeoX)."""
    shares_norm: bool = False
    """Of a parallel layer: one norm serves both."""
    residual_scale: float = 1.0
    """Outputs of attention and feed-forward are multiplied by it before they are added."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole model."""

    architecture: str
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the checkpoint."""
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    tied_embeddings: bool
    max_model_len: int
    """Tokens of context the model is made for."""
    positions: PositionsSpec | None = None
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by it, rounded to their dtype."""
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    """Logits become c * tanh(logit / c)."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def attentions(self) -> Iterator[AttentionSpec]:
        """Each layer's."""
        return (layer.attention for layer in self.layers)

    def max_activation_width(self, tp_size: int) -> int:
        """Elements of a token's widest activation on a rank: what a step needs beside weights and KV, roughly."""
        inner = max(
            layer.feed_forward.intermediate_size * (2 if layer.feed_forward.gated else 1) for layer in self.layers
        )
        heads = max((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim for spec in self.attentions())
        return max(self.hidden_size, inner // tp_size, heads // tp_size)
