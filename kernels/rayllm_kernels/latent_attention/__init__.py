"""Attention of all query heads over one compressed vector a token (latent attention), paged."""

from rayllm_kernels.latent_attention.reference import latent_attention, paged_latent_decode

__all__ = ["latent_attention", "paged_latent_decode"]
