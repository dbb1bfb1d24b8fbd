"""Normalisation over the last dimension."""

from rayllm_kernels.norm.reference import add_rms_norm, layer_norm, rms_norm

__all__ = ["add_rms_norm", "layer_norm", "rms_norm"]
