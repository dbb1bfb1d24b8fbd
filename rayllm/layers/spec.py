"""What layers are made of, as plain data: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Root-mean-square norm, or layer norm with a bias."""

    kind: Literal["rms", "layer"]
    eps: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` channels of each head."""

    theta: float
    rotary_dim: int
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    """Context of pretraining (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""
    in_pairs: bool = False
    """Neighbouring channels turn together, else those half the width apart."""


@dataclass(frozen=True, slots=True)
class PositionsSpec:
    """A learned vector for each position; position p is row p + offset of a table of `num_positions + offset`."""

    num_positions: int
    offset: int


@dataclass(frozen=True, slots=True)
class GroupedAttentionSpec:
    """Attention with keys and values of their own for each group of query heads; `num_kv_heads` = `num_heads` is
    multi-head attention, 1 is multi-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    rope: RopeSpec | None = None
    qk_norm: NormSpec | None = None
    """Applied to each head of queries and keys, before the rotation."""
    window: int | None = None
    """A token attends to itself and the `window - 1` tokens before it; None: to all before it."""
    soft_cap: float | None = None
    """Scores become c * tanh(score / c)."""
    has_sinks: bool = False
    """Each head has one more score in its softmax, a parameter, that takes weight and gives no value."""
    alibi_slopes: tuple[float, ...] = ()
    """One for each head, where positions enter by ALiBi."""


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A dense feed-forward layer."""

    intermediate_size: int
    activation: Activation
    gated: bool
    """activation(gate) * up, else activation(up)."""
    bias: bool = False


AttentionSpec = GroupedAttentionSpec
"""The union of all kinds of attention; `layers.attention` has the layer of each."""
FeedForwardSpec = MlpSpec
"""The union of all kinds of feed-forward layers; `layers.feed_forward` has the layer of each."""
