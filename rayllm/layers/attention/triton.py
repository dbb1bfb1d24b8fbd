"""The attention backend of RayLLM's own kernels that read keys and values from pages: the GPU's.

Nothing of a step is prepared on the host. Lines with one token are computed by a kernel that splits a line's keys over
programs, others by one that tiles queries.

Shape letters: see `backend.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LatentLayerAttention, LayerAttention
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.norm import Norm, RMSNorm
from rayllm_kernels.attention import PagedLines, Scoring, paged_decode, paged_prefill
from rayllm_kernels.kv_cache import write_kv, write_latent
from rayllm_kernels.latent_attention import paged_latent_decode, paged_latent_prefill
from rayllm_kernels.rope import HeadNorm, Rotation, rope_and_write, rope_and_write_latent

_MAX_ARRIVALS = 65536
"""Counters of lines times key/value heads; where a step has more, no line is split."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedStep:
    """A step as one KV group sees it: the first `num_decode_lines` tokens are one line each."""

    decode: PagedLines
    prefill: PagedLines
    slots_T: Tensor

    @property
    def num_decode_lines(self) -> int:
        return len(self.decode.rows_N)


class TritonBackend(AttentionBackend):
    """Paged attention by Triton kernels, without copies of keys and values and without the host."""

    name = "triton"
    uses_device_rows = True
    reads_unwritten_slots = False

    def __init__(self, groups: Sequence[Iterable[AttentionGroup]], dtype: torch.dtype, device: torch.device):
        self._arrivals = torch.zeros(_MAX_ARRIVALS, dtype=torch.int32, device=device)
        self._slopes_H = {
            group: torch.tensor(group.alibi_slopes, dtype=torch.float32, device=device)
            for group in set(chain(*groups))
            if group.alibi_slopes
        }

    def prepare(self, batch: Batch) -> list[PagedStep]:
        rows = batch.device_rows
        assert rows is not None, "the runner gives device rows to a backend that uses them"
        num_decode = rows.num_decode_lines
        steps = []
        for table_MB, slots_T in zip(rows.block_table_SMB, batch.slots_ST):
            starts_R1 = rows.query_starts_R1
            decode = PagedLines(rows.rows_R[:num_decode], rows.kv_lens_R[:num_decode], table_MB, starts_R1)
            prefill = PagedLines(
                rows.rows_R[num_decode:], rows.kv_lens_R[num_decode:], table_MB, starts_R1[num_decode:], num_decode
            )
            steps.append(PagedStep(decode, prefill, slots_T))
        return steps

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: PagedStep, layer: LayerAttention) -> None:
        k_cache, v_cache = kv
        write_kv(k_TKD, v_TKD, k_cache, v_cache, metadata.slots_T)

    def rotate_and_write(
        self,
        qkv_TAD: Tensor,
        rotation: Rotation | None,
        norm: HeadNorm | None,
        kv: LayerKV,
        metadata: PagedStep,
        layer: LayerAttention,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In one launch; keys and values are returned as they came."""
        k_cache, v_cache = kv
        q_THD = rope_and_write(qkv_TAD, k_cache, v_cache, metadata.slots_T, rotation, norm)
        num_heads, num_kv_heads = q_THD.shape[1], layer.group.num_kv_heads
        return q_THD, qkv_TAD[:, num_heads : num_heads + num_kv_heads], qkv_TAD[:, num_heads + num_kv_heads :]

    def forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: PagedStep, layer: LayerAttention
    ) -> Tensor:
        group, count = layer.group, metadata.num_decode_lines
        scoring = Scoring(layer.scale, group.window, layer.soft_cap, layer.sinks_H, self._slopes_H.get(group))
        k_cache, v_cache = kv
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if count:
            paged_decode(q_THD[:count], k_cache, v_cache, metadata.decode, scoring, self._arrivals, out_THD[:count])
        if count < len(q_THD):
            self.prefill(q_THD[count:], k_cache, v_cache, metadata, scoring, out_THD[count:])
        return out_THD

    def prefill(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: PagedStep,
        scoring: Scoring,
        out_THD: Tensor,
    ) -> None:
        """The attention of lines with several tokens, whose queries these are; a subclass may have a faster kernel.
        Never part of a CUDA graph."""
        paged_prefill(q_THD, k_cache, v_cache, metadata.prefill, scoring, out_THD)

    def write_latent(self, latent_TW: Tensor, kv: LayerKV, metadata: PagedStep, layer: LatentLayerAttention) -> None:
        write_latent(latent_TW, kv[0], metadata.slots_T)

    def rotate_and_write_latent(
        self,
        q_THD: Tensor,
        down_TW: Tensor,
        rotation: Rotation,
        norm: Norm,
        kv: LayerKV,
        metadata: PagedStep,
        layer: LatentLayerAttention,
    ) -> Tensor:
        """In one launch; latents are returned as they came."""
        if not isinstance(norm, RMSNorm):
            return super().rotate_and_write_latent(q_THD, down_TW, rotation, norm, kv, metadata, layer)
        rope_and_write_latent(q_THD, down_TW, kv[0], metadata.slots_T, rotation, norm.weight, norm.eps)
        return down_TW

    def forward_latent(
        self, q_THD: Tensor, latent_TW: Tensor, kv: LayerKV, metadata: PagedStep, layer: LatentLayerAttention
    ) -> Tensor:
        spec, count = layer.spec, metadata.num_decode_lines
        q_THW, out_THC, out_THV = (
            torch.empty((*q_THD.shape[:2], width), dtype=q_THD.dtype, device=q_THD.device)
            for width in (spec.kv_dim, spec.latent_dim, spec.value_dim)
        )
        layer.absorb.into(q_THD[..., : spec.nope_dim], q_THW[..., : spec.latent_dim])
        q_THW[..., spec.latent_dim :] = q_THD[..., spec.nope_dim :]
        if count:
            paged_latent_decode(q_THW[:count], kv[0], metadata.decode, spec.scale, self._arrivals, out_THC[:count])
        if count < len(q_THD):
            paged_latent_prefill(q_THW[count:], kv[0], metadata.prefill, spec.scale, out_THC[count:])
        layer.v_up.into(out_THC, out_THV)
        return out_THV
