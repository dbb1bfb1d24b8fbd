"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.norm.triton import add_rms_norm, layer_norm, rms_norm, rms_norm_add


def launches(arch: int) -> None:
    for width in (896, 4096, 16384):
        x, weight = meta(64, width), meta(width)
        rms_norm(x, weight, 1e-6)
        add_rms_norm(x, meta(64, width), weight, 1e-6)
    rms_norm(meta(64, 3584), meta(3584, dtype=torch.float32), 1e-6)  # Gemma
    rms_norm_add(meta(64, 3584), meta(64, 3584), meta(3584, dtype=torch.float32), 1e-6)
    rms_norm(meta(64, 32, 128), meta(32, 128), 1e-6)
    rms_norm(meta(64, 2112)[:, :1536], meta(1536), 1e-6)  # a latent
    layer_norm(meta(64, 5120), meta(5120), meta(5120), 1e-5)
    layer_norm(meta(64, 768, dtype=torch.float16), meta(768, dtype=torch.float16), None, 1e-5)
