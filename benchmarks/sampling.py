"""Milliseconds to sample one token a row, and to sort the vocabulary in full, in the same run. One JSON line.

    python benchmarks/sampling.py [--vocab-size 151936] [--batch-sizes 16 64] [--device cpu] [--threads 1]

Logits have the falling head and long tail of a language model's. `--flat`: the tail alone, where top-p keeps
thousands of tokens and every row takes the slow way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from rayllm.messages import RowParams
from rayllm.sampling.sampler import Sampler
from rayllm.transfer.upload import Upload

MODES = {
    "greedy": RowParams(temperature=0),
    "temperature": RowParams(temperature=0.8),
    "min_p": RowParams(temperature=0.8, min_p=0.05),
    "top_p": RowParams(temperature=0.8, top_p=0.9),
    "top_k": RowParams(temperature=0.8, top_k=50),
    "top_k_top_p": RowParams(temperature=0.8, top_k=50, top_p=0.9),
    "penalties": RowParams(temperature=0, repetition_penalty=1.1, frequency_penalty=0.2),
    "bad_words": RowParams(temperature=0, bad_words_token_ids=tuple((i, i + 1, i + 2)[: i % 3 + 1] for i in range(40))),
    "greedy_logprobs": RowParams(temperature=0, logprobs=5),
}


def make_logits(num_rows: int, vocab_size: int, *, flat: bool, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn((num_rows, vocab_size), generator=generator) * 2.0
    if not flat:
        head_ids = torch.rand((num_rows, vocab_size), generator=generator).topk(200).indices
        head = 22 - 2.2 * torch.arange(1, 201).float().log() + torch.randn((num_rows, 200), generator=generator)
        logits_NV.scatter_(1, head_ids, head)
    return logits_NV.to(device)


def full_sort(logits_NV: torch.Tensor) -> torch.Tensor:
    """What a plain top-p does: softmax, sort all, cumulative sum, draw, map back."""
    probs, ids = (logits_NV / 0.8).softmax(1).sort(dim=1, descending=True)
    probs[probs.cumsum(1) - probs >= 0.9] = 0
    return ids.gather(1, probs.multinomial(1))


def sample_once(sampler: Sampler, upload: Upload, logits_NV: torch.Tensor, last_token_M: torch.Tensor) -> None:
    """A step: prepared on the host, sent to the device, sampled."""
    draws = sampler.prepare(upload, list(range(len(logits_NV))))
    upload.send()
    sampler.sample(logits_NV, draws, last_token_M)


def median_ms(step: Callable[[], object], *, num_repeats: int, device: torch.device) -> float:
    times_s = []
    for _ in range(num_repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin_s = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - begin_s)
    return round(statistics.median(times_s[1:]) * 1e3, 3)


def measure(num_rows: int, arguments: argparse.Namespace) -> dict[str, float]:
    device = torch.device(arguments.device)
    logits_NV = make_logits(num_rows, arguments.vocab_size, flat=arguments.flat, device=device)
    num_repeats = arguments.num_repeats
    times_ms = {}
    for mode, params in MODES.items():
        sampler = Sampler(
            max_rows=num_rows,
            vocab_size=arguments.vocab_size,
            max_model_len=2048,
            eos_token_ids=(0,),
            device=device,
        )
        for row in range(num_rows):
            sampler.set_row(row, params, row, 0, list(range(1, 513)), 512)
        last_token_M = torch.zeros(num_rows, dtype=torch.int64, device=device)
        step = partial(sample_once, sampler, Upload(device), logits_NV, last_token_M)
        times_ms[mode] = median_ms(step, num_repeats=num_repeats, device=device)
    times_ms["full_sort_top_p"] = median_ms(lambda: full_sort(logits_NV), num_repeats=3, device=device)
    return times_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--num-repeats", type=int, default=9)
    parser.add_argument("--flat", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "benchmark": "sampling",
        **vars(arguments),
        "torch": torch.__version__,
        "ms": {str(num_rows): measure(num_rows, arguments) for num_rows in arguments.batch_sizes},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
