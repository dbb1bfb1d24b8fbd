"""Plans of steps whose results are of no use: they warm a worker up, or show what it needs."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.messages import RowParams, RowStart, RowTable, StepPlan
from rayllm.request import pack_ids

GREEDY = RowParams(temperature=0)
EVERY_RULE = RowParams(
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    min_tokens=1,
    logprobs=1,
    prompt_logprobs=1,
    logit_bias={0: 0.1},
)
"""What a row may ask of the sampler, but for a grammar, bad words and allowed ids."""


def step_of_new_rows(
    counts: Sequence[int],
    block_size: int,
    num_kv_groups: int,
    params: RowParams = GREEDY,
    num_computed: int = 0,
    room: int = 0,
) -> StepPlan:
    """`counts[r]` tokens of a row r that begins with them, after `num_computed` others, all of them in block 0, with
    `room` for so many more."""
    starts = []
    for row, count in enumerate(counts):
        num_tokens = num_computed + count
        tables = [RowTable(pack_ids([0] * -(-(num_tokens + room) // block_size)))] * num_kv_groups
        starts.append(RowStart(row, bytes(4 * num_tokens), num_tokens, num_computed, tables, params, 0, 0))
    rows = pack_ids(range(len(counts)))
    return StepPlan(0, 0, b"", starts, b"", b"", rows, pack_ids(counts), sum(counts))


def next_token_of(num_rows: int) -> StepPlan:
    """One more token of each of the rows from 0 on."""
    return StepPlan(0, 0, b"", [], b"", b"", pack_ids(range(num_rows)), pack_ids([1] * num_rows), num_rows)


def end_of(num_rows: int) -> StepPlan:
    """The rows from 0 on end, and nothing is computed."""
    return StepPlan(0, 0, pack_ids(range(num_rows)), [], b"", b"", b"", b"", 0)


def largest_counts(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> list[int]:
    """Tokens of each row in a step with as many tokens and, among those, as many rows as there may be: rows of one
    token first, then as few others as hold the rest."""
    counts = [1] * min(max_num_seqs, max_num_batched_tokens)
    left = max_num_batched_tokens - len(counts)
    for row in reversed(range(len(counts))):
        more = min(left, max_model_len - 1)
        counts[row] += more
        left -= more
    return counts
