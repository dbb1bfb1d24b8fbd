"""A worker's rows: what it keeps of each running sequence between steps, as arrays over row numbers.

The state is a pure fold of the plans received, the same on every rank. Sampled tokens are kept on the device
(`DeviceState`), where the next step reads them; the host only counts.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np

from rayllm.messages import RowStart, StepPlan
from rayllm.request import unpack_ids


class Rows:
    """`max_rows` rows, each with a table of at most `max_blocks` blocks in every KV group. Where it has no block, the
    table holds `no_block`: the number of one that is never written, because what a masked product reads must at least
    be finite. Blocks behind a window stay in the table; they may be another row's by then, and are not read.
    """

    def __init__(
        self,
        max_rows: int,
        max_blocks: int,
        no_block: int = 0,
        *,
        num_kv_groups: int = 1,
        notes_changes: bool = False,
    ):
        """`notes_changes`: for `take_changes`."""
        self.num_tokens = np.zeros(max_rows, np.int64)
        self.num_computed = np.zeros(max_rows, np.int64)
        self.num_blocks = np.zeros((num_kv_groups, max_rows), np.int64)
        """The ends of the tables."""
        self.block_table = np.full((num_kv_groups, max_rows, max_blocks), no_block, np.int32)
        self._no_block = no_block
        self._notes_changes = notes_changes
        self._changes: list[tuple[np.ndarray, np.ndarray]] = []
        self._tokens: dict[int, np.ndarray] = {}
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}

    def apply(self, plan: StepPlan) -> None:
        """Takes over the plan's differences: rows that end, rows that begin, blocks that are added."""
        for row in unpack_ids(plan.finished_rows):
            self._tokens.pop(row, None)
            self._prompt_logprobs.pop(row, None)
            self.num_blocks[:, row] = 0
        for start in plan.new_rows:
            self._begin(start)
        grown_rows = unpack_ids(plan.grown_rows)
        grown_groups = unpack_ids(plan.grown_groups) or repeat(0, len(grown_rows))
        for group, row, block in zip(grown_groups, grown_rows, unpack_ids(plan.grown_blocks), strict=True):
            end = self.num_blocks[group, row]
            self.block_table[group, row, end] = block
            self.num_blocks[group, row] += 1
            self._note_change(group, row, end, np.array([block], np.int32))

    def _note_change(self, group: int, row: int, begin: int, blocks: np.ndarray) -> None:
        if self._notes_changes:
            first = int(np.ravel_multi_index((group, row, begin), self.block_table.shape))
            self._changes.append((np.arange(first, first + len(blocks), dtype=np.int32), blocks))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices into the flat `block_table` and the blocks that were written there since this was asked last, int32
        both; each index once."""
        changes, self._changes = self._changes, []
        if not changes:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        indices, blocks = map(np.concatenate, zip(*changes, strict=True))
        return indices, blocks

    def _begin(self, start: RowStart) -> None:
        row = start.row
        tokens = np.frombuffer(start.tokens, np.int32)
        self._tokens[row] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_computed[row] = start.num_computed_tokens
        self.block_table[:, row] = self._no_block
        for group, table in enumerate(start.tables):
            blocks = np.frombuffer(table.blocks, np.int32)
            end = self.num_blocks[group, row] = table.first + len(blocks)
            self.block_table[group, row, table.first : end] = blocks
            self._note_change(group, row, table.first, blocks)
        self._prompt_logprobs.pop(row, None)
        if start.params.prompt_logprobs is not None:
            self._prompt_logprobs[row] = (start.params.prompt_logprobs, start.num_prompt_tokens)

    def blocks(self, row: int) -> set[int]:
        """Those that the row has, and had before its windows left them behind."""
        ends = self.num_blocks[:, row]
        return {block for table, end in zip(self.block_table[:, row], ends) for block in table[:end].tolist()}

    def start_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        """int32 tokens [begin, end) of those the row began with."""
        return self._tokens[row][begin:end]

    def num_start_tokens(self, row: int) -> int:
        """Tokens the row began with; later ones were sampled here."""
        return len(self._tokens[row])

    def advance(self, rows: np.ndarray, counts: np.ndarray, sampled_rows: np.ndarray) -> None:
        """`counts` tokens of `rows` now have KV, and each of `sampled_rows` has one token more."""
        self.num_computed[rows] += counts
        self.num_tokens[sampled_rows] += 1

    def prompt_logprobs_wanted(self, row: int) -> tuple[int, int] | None:
        """(number of candidates, prompt length) where the row's request asked for prompt log-probabilities."""
        return self._prompt_logprobs.get(row)
