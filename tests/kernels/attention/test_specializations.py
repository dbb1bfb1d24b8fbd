"""How often the attention kernels are compiled: once for a model, whatever a step holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import torch
from ahead_of_time import _AbsentGpu, meta
from triton.runtime.driver import driver

from rayllm_kernels import attention, latent_attention
from rayllm_kernels.device import interpreted
from rayllm_kernels.launch import observed

driver.set_active(_AbsentGpu(90))
kernels = {}

def compile_it(kernel, grid, args, constants):
    kernel.warmup(*args, grid=grid, **constants)
    kernels[kernel.__name__] = kernel

def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)

for num_decode, num_prefill, num_tokens in ((1, 0, 1), (16, 1, 32), (3, 16, 115), (200, 33, 2000)):
    rows, lens, starts = ints(300), ints(300), ints(300)
    table, arrivals, first = ints(256, 128), ints(65536), num_decode
    decode = attention.PagedLines(rows[:first], lens[:first], table, starts)
    last = first + num_prefill
    prefill = attention.PagedLines(rows[first:last], lens[first:last], table, starts[first : last + 1], first)
    q, out, cache = meta(num_tokens, 8, 64), meta(num_tokens, 8, 64), meta(100, 2, 64, 64)
    q_NHW, out_NHC, latents = meta(num_tokens, 16, 80), meta(num_tokens, 16, 64), meta(100, 1, 64, 80)
    scoring = attention.Scoring(0.1)
    with interpreted(), observed(compile_it):
        attention.paged_decode(q[:first], cache, cache, decode, scoring, arrivals, out[:first])
        attention.paged_prefill(q[first:], cache, cache, prefill, scoring, out[first:])
        latent_attention.paged_latent_decode(q_NHW[:first], latents, decode, 0.1, arrivals, out_NHC[:first])
        latent_attention.paged_latent_prefill(q_NHW[first:], latents, prefill, 0.1, out_NHC[first:])
for name, kernel in sorted(kernels.items()):
    print(name, len(kernel.device_caches[90][0]))
"""


@pytest.mark.kernels
def test_no_step_of_other_sizes_waits_for_the_compiler() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "tests"), str(root / "kernels"), str(root)])
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        *("decode_kernel", "1", "latent_decode_kernel", "1"),
        *("latent_prefill_kernel", "1", "prefill_kernel", "1"),
    ]
