"""Mixtures of experts: the choice of experts, and products of rows grouped by expert."""

from rayllm_kernels.moe.reference import choose_experts, grouped_linear

__all__ = ["choose_experts", "grouped_linear"]
