"""Attention: its kinds as layers, and the backends that compute it. A kind is chosen by the type of its spec."""

from __future__ import annotations

from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LatentLayerAttention, LayerAttention
from rayllm.layers.attention.choice import choose_backend
from rayllm.layers.attention.gathered import GatheredBackend
from rayllm.layers.attention.grouped import GroupedAttention, kv_heads_of
from rayllm.layers.attention.latent import LatentAttention
from rayllm.layers.attention.layer import AttentionLayer
from rayllm.layers.attention.needs import AttentionNeeds
from rayllm.layers.attention.triton import TritonBackend

__all__ = [
    "AttentionBackend",
    "AttentionGroup",
    "AttentionLayer",
    "AttentionNeeds",
    "GatheredBackend",
    "GroupedAttention",
    "LatentAttention",
    "LatentLayerAttention",
    "LayerAttention",
    "TritonBackend",
    "choose_backend",
    "kv_heads_of",
]
