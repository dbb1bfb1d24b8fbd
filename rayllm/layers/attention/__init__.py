"""Attention: its kinds as layers, and the backends that compute it. A kind is chosen by the type of its spec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LatentLayerAttention, LayerAttention
from rayllm.layers.attention.gathered import GatheredBackend
from rayllm.layers.attention.grouped import GroupedAttention, kv_heads_of
from rayllm.layers.attention.latent import LatentAttention
from rayllm.layers.attention.layer import AttentionLayer
from rayllm.layers.attention.triton import TritonBackend
from rayllm_kernels.device import uses_triton

__all__ = [
    "AttentionBackend",
    "AttentionGroup",
    "AttentionLayer",
    "GatheredBackend",
    "GroupedAttention",
    "LatentAttention",
    "LatentLayerAttention",
    "LayerAttention",
    "TritonBackend",
    "choose_backend",
    "kv_heads_of",
]


def choose_backend(
    groups: Sequence[Iterable[AttentionGroup]], dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend for all layers of a model whose queries, keys and values have `dtype`, chosen once at start. `groups`
    are those of each KV group."""
    if uses_triton(torch.empty(0, device=device)):
        return TritonBackend(groups, dtype, device)
    return GatheredBackend(groups, dtype, device)
