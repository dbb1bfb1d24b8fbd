"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.sampling import Draw, Group, append_to_histories, begin_histories, mask, penalise, sample


def launches(arch: int) -> None:
    groups = [Group(draw, None, 64, True, True) for draw in Draw]
    for num_rows, vocab_size in [(64, 151_936), (1, 32_000)]:
        sample(
            meta(num_rows, vocab_size, dtype=torch.float32),
            meta(4, num_rows, dtype=torch.int64),
            meta(4, num_rows, dtype=torch.float64),
            groups,
            meta(num_rows, dtype=torch.int64),
            meta(256, dtype=torch.int64),
            meta(num_rows, dtype=torch.uint8),
        )
    bits = meta(8, 151_936 // 8, dtype=torch.uint8)
    mask(meta(64, 151_936, dtype=torch.float32), meta(8, dtype=torch.int64), bits)
    _penalties()


def _penalties() -> None:
    counts, history = meta(64, 151_936, dtype=torch.int32), meta(64, 0, dtype=torch.int32)
    lines, numbers = meta(3, 64, dtype=torch.int64), meta(64, 3, dtype=torch.float32)
    begin_histories(counts, history, meta(40_000, dtype=torch.int32), meta(5, 4, dtype=torch.int64), 30_000)
    penalise(meta(64, 151_936, dtype=torch.float32), counts, history, lines, numbers, 30_000)
    append_to_histories(counts, history, lines, meta(64, dtype=torch.int64))
