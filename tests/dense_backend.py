"""An attention backend that reads a step's rows on the device, in plain torch: it multiplies every key of a row's table
and masks those that a token must not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayllm.layers.attention import AttentionBackend, LatentLayerAttention, LayerAttention
from rayllm.layers.batch import Batch, DeviceRows
from rayllm.layers.kv_cache import LayerKV


@dataclass(frozen=True)
class DenseStep:
    rows: DeviceRows
    table_MB: Tensor
    slots_T: Tensor


class DenseBackend(AttentionBackend):
    name = "dense"
    uses_device_rows = True

    def prepare(self, batch: Batch) -> list[DenseStep]:
        rows = batch.device_rows
        assert rows is not None
        return [DenseStep(rows, *of_group) for of_group in zip(rows.block_table_SMB, batch.slots_ST)]

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: DenseStep, layer: LayerAttention) -> None:
        for cache, new_TKD in zip(kv, (k_TKD, v_TKD)):  # slot -1 is the pool's last one, of the block no row has
            cache[metadata.slots_T // cache.shape[2], :, metadata.slots_T % cache.shape[2]] = new_TKD

    def forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: DenseStep, layer: LayerAttention
    ) -> Tensor:
        rows, (k_cache, v_cache) = metadata.rows, kv
        token_T = torch.arange(len(q_THD))
        line_T = torch.searchsorted(rows.query_starts_R1[1:].long(), token_T, right=True)
        is_padding_T = line_T == len(rows.kv_lens_R)
        line_T = line_T.clamp(max=len(rows.kv_lens_R) - 1)
        position_T = rows.kv_lens_R[line_T] - rows.query_starts_R1[1:][line_T] + token_T
        position_T = position_T.masked_fill(is_padding_T, -1)
        table_TB = metadata.table_MB[rows.rows_R[line_T]]
        k_TKLD, v_TKLD = (cache[table_TB].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))
        seen_TL = torch.arange(k_TKLD.shape[2]) <= position_T.unsqueeze(1)
        v_TKLD = v_TKLD * seen_TL[:, None, :, None]
        q_TKGD = q_THD.unflatten(1, (k_TKLD.shape[1], -1))
        scores = torch.einsum("tkgd,tkld->tkgl", q_TKGD, k_TKLD) * layer.scale
        scores = scores.masked_fill(~seen_TL[:, None, None], float("-inf"))
        return torch.einsum("tkgl,tkld->tkgd", scores.softmax(-1), v_TKLD).flatten(1, 2)

    def write_latent(self, latent_TW: Tensor, kv: LayerKV, metadata: Any, layer: LatentLayerAttention) -> None:
        raise NotImplementedError("the tests with this backend have no latent attention")

    def forward_latent(
        self, q_THD: Tensor, latent_TW: Tensor, kv: LayerKV, metadata: Any, layer: LatentLayerAttention
    ) -> Tensor:
        raise NotImplementedError("the tests with this backend have no latent attention")
