"""Rotary position embedding."""

from rayllm_kernels.rope.reference import rope

__all__ = ["rope"]
