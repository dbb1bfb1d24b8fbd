"""What the backend of the kernels that read pages prepares for a step."""

from __future__ import annotations

from dataclasses import replace

import torch

from rayllm.layers.attention import AttentionGroup, TritonBackend
from rayllm.layers.batch import Batch, DeviceRows

CPU = torch.device("cpu")


def _batch() -> Batch:
    """Two decode lines, a padding line, a chunk of three tokens; two KV groups."""
    rows = DeviceRows(
        rows_R=torch.tensor([4, 1, 0, 2], dtype=torch.int32),
        query_starts_R1=torch.tensor([0, 1, 2, 3, 6], dtype=torch.int32),
        kv_lens_R=torch.tensor([9, 3, 0, 5], dtype=torch.int32),
        block_table_SMB=torch.arange(2 * 5 * 3, dtype=torch.int32).view(2, 5, 3),
        num_decode_lines=3,
        max_query_len=3,
    )
    tokens_T = torch.zeros(6, dtype=torch.int64)
    return Batch(tokens_T, tokens_T, tokens_T.expand(2, -1), [], [], torch.empty(0), tokens_T, 2, 16, device_rows=rows)


def test_a_step_is_prepared_without_copies_of_what_the_device_has() -> None:
    backend, batch = TritonBackend([[AttentionGroup(1, 16)]] * 2, torch.float32, CPU), _batch()
    rows = batch.device_rows
    assert rows is not None
    first, second = backend.prepare(batch)
    assert (first.num_decode_lines, first.prefill.first_query) == (3, 3)
    assert first.prefill.rows_N.tolist() == [2]
    assert first.prefill.query_starts_N1.tolist() == [3, 6]
    assert second.decode.block_table_MB.data_ptr() == rows.block_table_SMB[1].data_ptr()
    assert first.decode.kv_lens_N.data_ptr() == rows.kv_lens_R.data_ptr()
    assert first.prefill.kv_lens_N.data_ptr() == rows.kv_lens_R[3:].data_ptr()


def test_rows_made_of_what_the_host_knows_are_those_of_the_step() -> None:
    batch = replace(_batch(), query_starts=[0, 1, 4], kv_lens=[9, 5], num_decode_rows=1).with_device_rows()
    rows = batch.device_rows
    assert rows is not None
    assert (rows.num_decode_lines, rows.max_query_len) == (1, 3)
    assert [x.tolist() for x in (rows.rows_R, rows.query_starts_R1, rows.kv_lens_R)] == [[0, 1], [0, 1, 4], [9, 5]]
