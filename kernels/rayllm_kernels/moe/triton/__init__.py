"""Mixtures of experts on a GPU, in five launches: choice, sorting, two products, sum. Their grids follow from shapes
alone, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rayllm_kernels.launch import launch
from rayllm_kernels.moe.triton.combine import combine_kernel
from rayllm_kernels.moe.triton.products import down_kernel, gate_up_kernel
from rayllm_kernels.moe.triton.route import choose_experts
from rayllm_kernels.moe.triton.sort import sort_by_expert
from rayllm_kernels.moe.triton.tiles import Tile, num_tiles, tile_of_products
from rayllm_kernels.moe.weights import ExpertWeights

__all__ = ["choose_experts", "mix_experts"]

_COMBINE_BLOCK = 1024


def mix_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    scores_TK: Tensor,
    weights: ExpertWeights,
    *,
    shared_TD: Tensor | None = None,
    shared_gate_T1: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """See `reference.mix_experts`. Products are summed in float32; the inner state and each expert's output, times its
    score, are rounded to the dtype of `x_TD`."""
    assert x_TD.stride(1) == 1, "channels must be neighbours"
    experts_TK, scores_TK = experts_TK.contiguous(), scores_TK.contiguous()
    starts_E1, choices_N = sort_by_expert(experts_TK, weights.held)
    tile = tile_of_products(experts_TK.numel(), weights.total or len(weights.held), x_TD.dtype)
    inner_NI = _gate_up(x_TD, scores_TK, starts_E1, choices_N, weights, tile)
    y_ND = _down(inner_NI, scores_TK, starts_E1, choices_N, weights, tile)
    return _combine(y_ND, experts_TK, weights.held, shared_TD, shared_gate_T1, residual_TD)


def _gate_up(
    x_TD: Tensor, scores_TK: Tensor, starts_E1: Tensor, choices_N: Tensor, weights: ExpertWeights, tile: Tile
) -> Tensor:
    """activation(gate(x)) * up(x) of the choices, sorted by expert."""
    (num_choices,), (num_held, rows, width) = choices_N.shape, weights.gate_up_E2ID.shape
    inner_NI = torch.empty((num_choices, rows // 2), dtype=x_TD.dtype, device=x_TD.device)
    launch(
        gate_up_kernel,
        (triton.cdiv(rows // 2, tile.gate_outputs), num_tiles(num_choices, num_held, tile.tokens)),
        x_TD,
        weights.gate_up_E2ID,
        weights.gate_up_bias_E2I,
        scores_TK,
        starts_E1,
        choices_N,
        inner_NI,
        weights.alpha,
        weights.limit,
        x_TD.stride(0),
        NUM_EXPERTS=num_held,
        TOP_K=scores_TK.shape[1],
        WIDTH=width,
        INNER=rows // 2,
        ACTIVATION=weights.activation,
        BIAS=weights.gate_up_bias_E2I is not None,
        SCORES=weights.scores_weigh_inputs,
        BLOCK_E=triton.next_power_of_2(num_held),
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.gate_outputs,
        BLOCK_K=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return inner_NI


def _down(
    inner_NI: Tensor, scores_TK: Tensor, starts_E1: Tensor, choices_N: Tensor, weights: ExpertWeights, tile: Tile
) -> Tensor:
    """The experts' outputs in the order of the choices; those of experts that are not held are left unwritten."""
    (num_choices,), (num_held, width, inner) = choices_N.shape, weights.down_EDI.shape
    y_ND = torch.empty((num_choices, width), dtype=inner_NI.dtype, device=inner_NI.device)
    launch(
        down_kernel,
        (triton.cdiv(width, tile.down_outputs), num_tiles(num_choices, num_held, tile.tokens)),
        inner_NI,
        weights.down_EDI,
        weights.down_bias_ED,
        scores_TK,
        starts_E1,
        choices_N,
        y_ND,
        NUM_EXPERTS=num_held,
        INNER=inner,
        WIDTH=width,
        BIAS=weights.down_bias_ED is not None,
        SCORES=not weights.scores_weigh_inputs,
        BLOCK_E=triton.next_power_of_2(num_held),
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.down_outputs,
        BLOCK_K=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y_ND


def _combine(
    y_ND: Tensor,
    experts_TK: Tensor,
    held: range,
    shared_TD: Tensor | None,
    shared_gate_T1: Tensor | None,
    residual_TD: Tensor | None,
) -> Tensor:
    for name, given in (("shared_TD", shared_TD), ("residual_TD", residual_TD)):
        assert given is None or given.stride(1) == 1, f"channels of {name} must be neighbours"
    num_tokens, top_k = experts_TK.shape
    width = y_ND.shape[1]
    out_TD = torch.empty((num_tokens, width), dtype=y_ND.dtype, device=y_ND.device)
    launch(
        combine_kernel,
        (num_tokens, triton.cdiv(width, _COMBINE_BLOCK)),
        y_ND,
        experts_TK,
        shared_TD,
        shared_gate_T1,
        residual_TD,
        out_TD,
        held.start,
        held.stop,
        0 if shared_TD is None else shared_TD.stride(0),
        0 if shared_gate_T1 is None else shared_gate_T1.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        width,
        TOP_K=top_k,
        SHARED=shared_TD is not None,
        SHARED_GATE=shared_gate_T1 is not None,
        RESIDUAL=residual_TD is not None,
        BLOCK=_COMBINE_BLOCK,
        num_warps=4,
    )
    return out_TD
