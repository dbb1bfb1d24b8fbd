"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.all_reduce import Peers, one_shot, two_shot


def launches(arch: int) -> None:
    for size, dtype in ((2, torch.bfloat16), (8, torch.bfloat16), (8, torch.float32)):
        addresses, calls = meta(size, dtype=torch.int64), meta(2, dtype=torch.int64)
        peers = Peers(1, size, 1 << 22, addresses, calls, meta(1, dtype=torch.int32))
        one_shot(meta(16, 4096, dtype=dtype), peers)
        two_shot(meta(128, 4096, dtype=dtype), peers)
