"""What a decoder is made of, as plain data: a difference between models is a field here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayllm.layers.spec import Activation, AttentionSpec, MlpSpec, NormSpec, PositionsSpec, RopeSpec

__all__ = [
    "Activation",
    "AttentionSpec",
    "DecoderSpec",
    "LayerSpec",
    "MlpSpec",
    "NormSpec",
    "PositionsSpec",
    "RopeSpec",
]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec
    norm_first: bool = True
    """Norms stand before attention and feed-forward, else after the residual sum."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole model. All its layers have the same KV shape."""

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

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return self.layers[0].attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.layers[0].attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].attention.head_dim
