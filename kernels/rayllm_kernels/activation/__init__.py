"""Activations of feed-forward layers."""

from rayllm_kernels.activation.reference import ACTIVATIONS, silu_mul

__all__ = ["ACTIVATIONS", "silu_mul"]
