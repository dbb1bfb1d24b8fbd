"""Lines with several tokens by FlashInfer (Ye et al., 2025), where it is installed; all else as `TritonBackend` does.

Shape letters: see `backend.py`; N lines with several tokens, I blocks of all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllm.layers.attention.backend import AttentionGroup
from rayllm.layers.attention.needs import AttentionNeeds, refusal_of_library
from rayllm.layers.attention.triton import PagedStep, TritonBackend
from rayllm.layers.batch import Batch
from rayllm_kernels.attention import Scoring

_MODULE = "flashinfer"
_WORKSPACE_BYTES = 128 * 2**20
"""What its documentation recommends."""
_Kind = tuple[int, int, int, float, int | None, float | None]
"""Query heads, key/value heads, head width, scale, window and soft cap: what one of its plans is for."""


@dataclass(frozen=True, slots=True, eq=False)
class FlashInferStep(PagedStep):
    turn: int
    """Which of the objects that take turns plans this step."""
    kv_group: int
    query_starts_N1: Tensor
    """int32 on the host, as all that its plans read, but the blocks."""
    block_starts_N1: Tensor
    blocks_I: Tensor
    last_block_lens_N: Tensor
    planned: dict[_Kind, Any] = field(default_factory=dict)


class FlashInferBackend(TritonBackend):
    """Prefill by FlashInfer."""

    name = "flashinfer"
    reads_unwritten_slots = True

    @staticmethod
    def refusal(needs: AttentionNeeds) -> str:
        """Why it cannot serve a model; empty where it can."""
        if reason := refusal_of_library(needs, _MODULE, "FlashInfer", (64, 128, 256)):
            return reason
        major, minor = needs.capability()
        return "" if major >= 8 else f"its kernels need compute capability 8.0, and this GPU has {major}.{minor}"

    def __init__(self, groups: Sequence[Iterable[AttentionGroup]], dtype: torch.dtype, device: torch.device):
        super().__init__(groups, dtype, device)
        self._library = importlib.import_module(_MODULE)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[int, int, _Kind], Any] = {}
        self._turn = 0

    def prepare(self, batch: Batch) -> list[PagedStep]:
        steps, first = super().prepare(batch), batch.num_decode_rows
        if first == batch.num_rows:
            return steps
        starts = np.array(batch.query_starts[first:], np.int32)
        lens = np.array(batch.kv_lens[first:], np.int32)
        num_blocks = -(-lens // batch.block_size)
        block_starts = np.concatenate(([0], num_blocks.cumsum())).astype(np.int32)
        within = np.arange(block_starts[-1]) - np.repeat(block_starts[:-1], num_blocks)
        self._turn = 1 - self._turn  # of the step before, which may be on its way, a plan may still be copied
        return [
            FlashInferStep(
                step.decode,
                step.prefill,
                step.slots_T,
                turn=self._turn,
                kv_group=kv_group,
                query_starts_N1=torch.from_numpy(starts - starts[0]),
                block_starts_N1=torch.from_numpy(block_starts),
                blocks_I=_blocks(step, np.repeat(np.arange(len(lens)), num_blocks), within),
                last_block_lens_N=torch.from_numpy((lens - 1) % batch.block_size + 1),
            )
            for kv_group, step in enumerate(steps)
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
        assert isinstance(metadata, FlashInferStep), "prepare made this step's metadata"
        num_tokens = int(metadata.query_starts_N1[-1])
        num_kv_heads, page_size, head_dim = k_cache.shape[1:]
        kind = (q_THD.shape[1], num_kv_heads, head_dim, scoring.scale, scoring.window, scoring.soft_cap)
        if kind not in metadata.planned:
            metadata.planned[kind] = self._plan(kind, metadata, page_size, q_THD.dtype)
        wrapper = metadata.planned[kind]
        wrapper.run(q_THD[:num_tokens], (k_cache, v_cache), out=out_THD[:num_tokens])

    def _plan(self, kind: _Kind, step: FlashInferStep, page_size: int, dtype: torch.dtype) -> Any:
        """The library's object for these layers, told of the step."""
        num_heads, num_kv_heads, head_dim, scale, window, soft_cap = kind
        key = (step.turn, step.kv_group, kind)
        if key not in self._wrappers:
            self._wrappers[key] = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        self._wrappers[key].plan(
            step.query_starts_N1,
            step.block_starts_N1,
            step.blocks_I,
            step.last_block_lens_N,
            num_heads,
            num_kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=soft_cap,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return self._wrappers[key]


def _blocks(step: PagedStep, lines: np.ndarray, within: np.ndarray) -> Tensor:
    """The block `within[i]` of the line `lines[i]`, for each i."""
    table_MB, rows_N = step.prefill.block_table_MB, step.prefill.rows_N
    index = torch.from_numpy(np.stack((lines, within))).to(table_MB.device, non_blocking=True)
    return table_MB[rows_N[index[0]].long(), index[1]]
