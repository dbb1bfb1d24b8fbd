"""The launches of whole steps, with the arguments that they have there: see `ahead_of_time.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ahead_of_time import meta
from fake_device import build_guard, fake_cuda
from fake_steps import Case, run
from torch import Tensor

from rayllm_kernels.launch import launch

CASES = [
    *(Case(model=model, kind=kind) for model in ("llama", "qwen3") for kind in ("decode", "mixed")),
    *(Case(sampling=sampling) for sampling in ("top_p", "top_k", "penalties", "edited", "bad_words", "logprobs")),
    Case(sampling="grammar"),
]


def launches(arch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        guard = build_guard(Path(folder))
        with fake_cuda(guard, arch) as log:
            recorded = []
            for case in CASES:
                run(case, Path(folder), log)
                recorded += log.kernels
    for kernel, grid, args, constants in recorded:
        launch(kernel, grid, *(_without_device(arg) for arg in args), **constants)


def _without_device(arg: Any) -> Any:
    return meta(*arg.shape, dtype=arg.dtype) if isinstance(arg, Tensor) else arg
