"""Attention of all query heads over one compressed vector a token (latent attention), paged."""

from rayllm_kernels.latent_attention.gathered import gathered_latent_decode, latent_attention
from rayllm_kernels.latent_attention.reference import paged_latent_decode, paged_latent_prefill

__all__ = ["gathered_latent_decode", "latent_attention", "paged_latent_decode", "paged_latent_prefill"]
