"""Sampling as a worker does it: prepared on the host, sampled on the device, read back."""

from __future__ import annotations

import numpy as np
import torch

from rayllm.sampling.sampler import Sampled, SampledOnHost, Sampler
from rayllm.transfer.download import Download
from rayllm.transfer.upload import Upload

CPU = torch.device("cpu")


def sample_on_device(
    sampler: Sampler, logits_NV: torch.Tensor, rows: list[int], masks: tuple[list[int], np.ndarray] | None = None
) -> Sampled:
    upload = Upload(CPU)
    draws = sampler.prepare(upload, rows, masks)
    upload.send()
    return sampler.sample(logits_NV, draws, torch.zeros(max(rows) + 1, dtype=torch.int64))


def sample(
    sampler: Sampler, logits_NV: torch.Tensor, rows: list[int], masks: tuple[list[int], np.ndarray] | None = None
) -> SampledOnHost:
    download = Download(CPU)
    sampled = sample_on_device(sampler, logits_NV, rows, masks).to_host(download)
    download.start()
    return sampled
