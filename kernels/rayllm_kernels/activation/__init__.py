"""Activations of feed-forward layers."""

from rayllm_kernels.activation.reference import ACTIVATIONS, clamped_swiglu, silu_mul

__all__ = ["ACTIVATIONS", "clamped_swiglu", "silu_mul"]
