"""Lines with several tokens by FlashAttention 3 (Shah et al., 2024), where it is installed; all else as `TritonBackend`
does it.

Shape letters: see `backend.py`; N lines with several tokens, B blocks of a table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.layers.attention.backend import AttentionGroup
from rayllm.layers.attention.needs import AttentionNeeds, refusal_of_library
from rayllm.layers.attention.triton import PagedStep, TritonBackend
from rayllm.layers.batch import Batch
from rayllm_kernels.attention import Scoring

_MODULE = "flash_attn_interface"


@dataclass(frozen=True, slots=True, eq=False)
class FlashAttentionStep(PagedStep):
    table_NB: Tensor
    starts_N1: Tensor
    """int32 offsets into the queries of lines with several tokens."""
    max_query_len: int


class FlashAttentionBackend(TritonBackend):
    """Prefill by FlashAttention 3 on Hopper GPUs."""

    name = "flash-attn"
    reads_unwritten_slots = True

    @staticmethod
    def refusal(needs: AttentionNeeds) -> str:
        """Why it cannot serve a model; empty where it can."""
        if reason := refusal_of_library(needs, _MODULE, "FlashAttention 3", range(8, 257, 8)):
            return reason
        major, minor = needs.capability()
        return "" if major == 9 else f"its kernels are for compute capability 9.0, and this GPU has {major}.{minor}"

    def __init__(self, groups: Sequence[Iterable[AttentionGroup]], dtype: torch.dtype, device: torch.device):
        super().__init__(groups, dtype, device)
        self._attend = importlib.import_module(_MODULE).flash_attn_with_kvcache

    def prepare(self, batch: Batch) -> list[PagedStep]:
        steps = super().prepare(batch)
        rows = batch.device_rows
        if rows is None or rows.num_decode_lines == len(rows.rows_R):
            return steps
        starts_N1 = steps[0].prefill.query_starts_N1 - rows.num_decode_lines
        return [
            FlashAttentionStep(
                step.decode,
                step.prefill,
                step.slots_T,
                table_NB=step.prefill.block_table_MB.index_select(0, step.prefill.rows_N),
                starts_N1=starts_N1,
                max_query_len=rows.max_query_len,
            )
            for step in steps
        ]

    def prefill(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: PagedStep,
        scoring: Scoring,
        out_THD: Tensor,
    ) -> None:
        assert isinstance(metadata, FlashAttentionStep), "prepare made this step's metadata"
        found_THD = self._attend(
            q_THD,
            k_cache.transpose(1, 2),  # its pages are [page, heads, width], of any strides
            v_cache.transpose(1, 2),
            cache_seqlens=metadata.prefill.kv_lens_N,
            page_table=metadata.table_NB,
            cu_seqlens_q=metadata.starts_N1,
            max_seqlen_q=metadata.max_query_len,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=(-1, -1) if scoring.window is None else (scoring.window - 1, 0),
            softcap=scoring.soft_cap or 0.0,
        )
        out_THD.copy_(found_THD)
