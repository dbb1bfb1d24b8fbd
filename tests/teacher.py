"""Teacher forcing: a decoder is given known tokens, cut into steps in some way, and says its log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.kv_layout import KVSpan
from rayllm.layers.batch import Batch
from rayllm.models import Model, load_model
from rayllm.models.registry import read_spec, register_architecture

CPU = torch.device("cpu")


class PagedRun:
    """Sequences in shuffled blocks of one KV pool; `step` computes the next tokens of some of them."""

    def __init__(self, model: Model, sequences: Sequence[Sequence[int]], block_size: int, seed: int = 0):
        self._model = model
        self._sequences = sequences
        self._block_size = block_size
        self.done = [0] * len(sequences)
        counts = [-(-len(tokens) // block_size) for tokens in sequences]
        num_blocks = len(model.kv_groups) * sum(counts) + 3
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        self._tables = [[[blocks.pop() for _ in range(count)] for count in counts] for _ in model.kv_groups]
        self._pool = model.allocate_kv(num_blocks, block_size)
        self._pool.clear(range(num_blocks))
        self.kv = self._pool.layers

    def batch(self, counts: dict[int, int]) -> tuple[Batch, list[int]]:
        """The batch that computes the next `counts[i]` tokens of sequence i, all positions wanted; and its rows."""
        rows = sorted(counts, key=lambda row: counts[row] > 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self._tables]
        starts = [0]
        for row in rows:
            for position in range(self.done[row], self.done[row] + counts[row]):
                ids.append(self._sequences[row][position])
                positions.append(position)
                for table, of_group in zip(self._tables, slots, strict=True):
                    block = table[row][position // self._block_size]
                    of_group.append(block * self._block_size + position % self._block_size)
            starts.append(len(ids))
        width = max(len(self._tables[0][row]) for row in rows)
        tables = [[table[row] + [0] * (width - len(table[row])) for row in rows] for table in self._tables]
        batch = Batch(
            token_ids_T=torch.tensor(ids),
            positions_T=torch.tensor(positions),
            slots_ST=torch.tensor(slots),
            query_starts=starts,
            kv_lens=[self.done[row] + counts[row] for row in rows],
            block_table_SRB=torch.tensor(tables, dtype=torch.int32),
            logits_indices_N=torch.arange(len(ids)),
            num_decode_rows=sum(counts[row] == 1 for row in rows),
            block_size=self._block_size,
            beyond_T=self._beyond(rows, counts),
        )
        return batch.with_device_rows() if self._model.backend.uses_device_rows else batch, rows

    def _beyond(self, rows: list[int], counts: dict[int, int]) -> Tensor | None:
        boundary = self._model.decoder.spec.rope_boundary
        if boundary is None:
            return None
        return torch.tensor([len(self._sequences[row]) > boundary for row in rows for _ in range(counts[row])])

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states of the batch's wanted positions."""
        return self._model.forward(batch, self._pool)

    @torch.inference_mode()
    def step(self, counts: dict[int, int]) -> dict[int, Tensor]:
        """Log-probabilities at each computed position, by sequence."""
        batch, rows = self.batch(counts)
        logits = self._model.logits(self.forward(batch))
        found = {}
        for i, row in enumerate(rows):
            found[row] = logits[batch.query_starts[i] : batch.query_starts[i + 1]].log_softmax(-1)
            self.done[row] += counts[row]
            self._leave_behind(row)
        return found

    def _leave_behind(self, row: int) -> None:
        """The blocks that no later token sees become NaN: a backend that reads them gives NaN."""
        for group, tables in zip(self._model.kv_groups, self._tables, strict=True):
            behind = tables[row][: KVSpan(self._block_size, group.window).begin(self.done[row])]
            for layer in group.layers if behind else ():
                for cache in self.kv[layer]:
                    cache[behind] = torch.nan


def log_probs(model: Model, sequences: Sequence[Sequence[int]], chunks: Sequence[int], block_size: int) -> list[Tensor]:
    """Log-probabilities at every position; sequence i is computed `chunks[i]` tokens a step, all in one batch."""
    run = PagedRun(model, sequences, block_size)
    found: list[list[Tensor]] = [[] for _ in sequences]
    while True:
        left = {i: len(tokens) - run.done[i] for i, tokens in enumerate(sequences)}
        counts = {i: min(chunks[i], num) for i, num in left.items() if num}
        if not counts:
            return [torch.cat(parts) for parts in found]
        for i, part in run.step(counts).items():
            found[i].append(part)


def load(
    tp: TensorParallel,
    path: Path | str,
    load_format: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Model:
    return load_model(str(path), read_spec(path), tp, dtype=dtype, device=CPU, load_format=load_format, seed=seed)


def log_probs_of_folder(
    tp: TensorParallel,
    path: str,
    sequences: Sequence[Sequence[int]],
    cuts: Sequence[Sequence[int]],
    block_size: int,
    load_format: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[list[np.ndarray]]:
    """`log_probs` for each way of cutting in `cuts`; what a rank of a pool runs."""
    model = load(tp, path, load_format, dtype=dtype)
    return [[part.numpy() for part in log_probs(model, sequences, chunks, block_size)] for chunks in cuts]


def expert_parallel_log_probs(tp: TensorParallel, *arguments: Any) -> list[list[np.ndarray]]:
    """`log_probs_of_folder(tp, *arguments)` with whole experts shared out over the ranks."""
    return log_probs_of_folder(replace(tp, expert_parallel=True), *arguments)


def registered_log_probs(tp: TensorParallel, name: str, module: str, *arguments: Any) -> list[list[np.ndarray]]:
    """`log_probs_of_folder(tp, *arguments)` with architecture `name` registered, in whichever process this is."""
    register_architecture(name, module)
    return log_probs_of_folder(tp, *arguments)
