"""What a worker keeps of its rows on the device from step to step. Shape letters: see `layers/batch.py`."""

from __future__ import annotations

import torch


class DeviceState:
    """The newest token and the block tables of M rows, at the same addresses for as long as the worker lives: CUDA
    graphs hold them. What it holds of rows that have not begun means nothing."""

    def __init__(self, num_rows: int, num_kv_groups: int, max_blocks: int, device: torch.device):
        """Without tables (`max_blocks` 0) where the attention backend gets them from the host."""
        self.last_token_M = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """The token last sampled for a row, which the host may not know yet."""
        self.block_table_SMB = torch.zeros((num_kv_groups, num_rows, max_blocks), dtype=torch.int32, device=device)
