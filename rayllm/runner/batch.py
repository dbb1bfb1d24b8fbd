"""From a plan's rows and counts to the tensors of one step. Shape letters: see `layers/batch.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rayllm.layers.batch import Batch
from rayllm.runner.rows import Rows


@dataclass(frozen=True, slots=True)
class PromptLogprobSpan:
    """Positions of one row's chunk whose next prompt token's log-probability was asked for."""

    row: int
    num_top: int
    next_ids: np.ndarray
    """int32: the prompt token that follows each position."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """A `Batch` and what its N hidden states are for: first one for each of `sampled_rows`, then the spans' positions
    in order."""

    batch: Batch
    sampled_rows: np.ndarray
    spans: list[PromptLogprobSpan]


def build_step(
    rows: Rows,
    row_ids: np.ndarray,
    counts: np.ndarray,
    block_size: int,
    device: torch.device,
    rope_boundary: int | None = None,
) -> StepInput:
    """The step that computes `counts` tokens of `row_ids` (rows with count 1 first), given what `rows` holds.

    A row's rotary embedding follows from all tokens that the row has, so the first chunk of a long prompt is computed
    as its last one; a row that grows past `rope_boundary` is started anew by the scheduler before it is computed again.
    """
    begins = rows.num_computed[row_ids]
    ends = begins + counts
    starts = np.zeros(len(row_ids) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    num_decode = int(np.count_nonzero(counts == 1))
    assert (counts[:num_decode] == 1).all(), "rows with one token must come first"

    row_of_token = np.repeat(row_ids, counts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - begins, counts)
    slots = rows.block_table[:, row_of_token, positions // block_size].astype(np.int64) * block_size
    slots += positions % block_size

    samples = ends == rows.num_tokens[row_ids]
    spans, span_indices = _prompt_logprob_spans(rows, row_ids, begins, ends, starts)
    logits_indices = np.concatenate([starts[1:][samples] - 1, *span_indices])

    beyond_T = None
    if rope_boundary is not None:
        beyond_T = torch.from_numpy(np.repeat(rows.num_tokens[row_ids] > rope_boundary, counts)).to(device)

    max_blocks = int((ends.max() + block_size - 1) // block_size)
    batch = Batch(
        token_ids_T=_token_ids(rows, row_ids, begins, ends, starts, device),
        positions_T=torch.from_numpy(positions).to(device),
        slots_ST=torch.from_numpy(slots).to(device),
        query_starts=starts.tolist(),
        kv_lens=ends.tolist(),
        block_table_SRB=torch.from_numpy(rows.block_table[:, row_ids, :max_blocks]).to(device),
        logits_indices_N=torch.from_numpy(logits_indices).to(device),
        num_decode_rows=num_decode,
        block_size=block_size,
        beyond_T=beyond_T,
    )
    return StepInput(batch, row_ids[samples], spans)


def _token_ids(
    rows: Rows, row_ids: np.ndarray, begins: np.ndarray, ends: np.ndarray, starts: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Tokens that a row began with come from the host; one that was sampled here is still on the device."""
    token_ids = np.zeros(starts[-1], np.int64)
    from_device: list[int] = []
    for i, (row, begin, end) in enumerate(zip(row_ids.tolist(), begins.tolist(), ends.tolist(), strict=True)):
        num_known = rows.num_start_tokens(row)
        if end <= num_known:
            token_ids[starts[i] : starts[i + 1]] = rows.start_tokens(row, begin, end)
        else:
            assert begin == end - 1 == rows.num_tokens[row] - 1, "only a row's newest token may be on the device alone"
            from_device.append(i)
    token_ids_T = torch.from_numpy(token_ids).to(device)
    if from_device:
        sources = torch.from_numpy(row_ids[from_device].astype(np.int64)).to(device)
        targets = torch.from_numpy(starts[from_device]).to(device)
        token_ids_T[targets] = rows.last_token_R[sources]
    return token_ids_T


def _prompt_logprob_spans(
    rows: Rows, row_ids: np.ndarray, begins: np.ndarray, ends: np.ndarray, starts: np.ndarray
) -> tuple[list[PromptLogprobSpan], list[np.ndarray]]:
    spans: list[PromptLogprobSpan] = []
    indices: list[np.ndarray] = []
    for i, row in enumerate(row_ids.tolist()):
        wanted = rows.prompt_logprobs_wanted(row)
        if wanted is None:
            continue
        num_top, num_prompt = wanted
        end = min(int(ends[i]), num_prompt - 1)
        if begins[i] >= end:
            continue
        begin = int(begins[i])
        spans.append(PromptLogprobSpan(row, num_top, rows.start_tokens(row, begin + 1, end + 1)))
        indices.append(np.arange(starts[i], starts[i] + end - begin))
    return spans, indices
