"""Milliseconds of one decode step and of one prefill, against `transformers` in the same run; one JSON line.

    python benchmarks/decode_step.py --threads 2

Random weights of Qwen2-0.5B's shape with a vocabulary of 32000. Runs of both sides are interleaved and the median is
taken. `shares` says where RayLLM's time goes, measured in passes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
BLOCK_SIZE = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="length of each prompt of the prefill")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--no-transformers", action="store_true")
    return parser.parse_args()


class Ours:
    """RayLLM's decoder with `batch` sequences of `context` tokens in shuffled blocks."""

    def __init__(self, args: argparse.Namespace):
        import torch

        from rayllm.distributed.groups import TensorParallel
        from rayllm.models import load_model
        from rayllm.models.registry import read_spec

        self._args = args
        dtype, device = getattr(torch, args.dtype), torch.device("cpu")
        with tempfile.TemporaryDirectory() as folder:
            config = {**SHAPE, "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": args.layers}
            (Path(folder) / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
            spec = read_spec(folder)
            tp = TensorParallel()
            self._model = load_model(folder, spec, tp, dtype=dtype, device=device, load_format="dummy")
        self._blocks_a_row = -(-max(args.context + 1, args.prompt) // BLOCK_SIZE)
        num_blocks = self._blocks_a_row * args.batch
        self._pool = self._model.allocate_kv(num_blocks, BLOCK_SIZE)
        self._pool.clear(range(num_blocks))
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self._table = order.view(args.batch, self._blocks_a_row).int()

    def _step(self, first: int, count: int) -> None:
        import torch

        from rayllm.layers.batch import Batch

        rows = self._args.batch
        positions = torch.arange(first, first + count).repeat(rows)
        table = self._table.long().repeat_interleave(count, dim=0)
        blocks = table.gather(1, (positions // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        batch = Batch(
            token_ids_T=(positions * 7919 + 13) % SHAPE["vocab_size"],
            positions_T=positions,
            slots_ST=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE)[None],
            query_starts=list(range(0, rows * count + 1, count)),
            kv_lens=[first + count] * rows,
            block_table_SRB=self._table[None],
            logits_indices_N=torch.arange(count - 1, rows * count, count),
            num_decode_rows=rows if count == 1 else 0,
            block_size=BLOCK_SIZE,
        )
        with torch.inference_mode():
            self._model.logits(self._model.forward(batch, self._pool))

    def prefill(self) -> None:
        self._step(0, self._args.prompt)

    def decode(self) -> None:
        self._step(self._args.context, 1)


class Theirs:
    """The same shape in `transformers`, its cache cut back after each step."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

        config = Qwen2Config(**SHAPE, num_hidden_layers=args.layers)
        self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
        self._prompt = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.prompt))
        self._cache = DynamicCache(config=config)
        with torch.inference_mode():
            ids = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.context))
            self._model(ids, past_key_values=self._cache, logits_to_keep=1)

    def prefill(self) -> None:
        import torch

        with torch.inference_mode():
            self._model(self._prompt, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        import torch

        with torch.inference_mode():
            self._model(self._prompt[:, :1], past_key_values=self._cache, logits_to_keep=1)
        self._cache.crop(-1)


def milliseconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def shares(work: Callable[[], None], repeats: int) -> dict[str, float]:
    """The parts of `work`'s time spent in linear layers, in attention and in the rest."""
    from rayllm.layers.attention import GatheredBackend
    from rayllm.linear import PackedLinear, WidenedLinear

    spent = {"linear": 0.0, "attention": 0.0}
    inside = False

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args)
            inside = True
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - start
                inside = False

        return call

    methods = ("__call__", "activated", "times", "plus")
    patched = [(kind, name, "linear") for kind in (PackedLinear, WidenedLinear) for name in methods]
    patched.append((GatheredBackend, "forward", "attention"))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, part in patched:
        setattr(owner, name, timed(getattr(owner, name), part))
    total = sum(milliseconds(work) for _ in range(repeats)) / 1e3
    for owner, name, function in originals:
        setattr(owner, name, function)
    found = {name: round(seconds / total, 3) for name, seconds in spent.items()}
    return {**found, "rest": round(1 - sum(found.values()), 3)}


def main() -> None:
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    sides: dict[str, Any] = {"rayllm": Ours(args)}
    if not args.no_transformers:
        sides["transformers"] = Theirs(args)
    result: dict[str, Any] = {"bench": "decode_step", **vars(args), "shape": "qwen2-0.5b", "torch": torch.__version__}
    for phase, repeats in (("decode", args.repeats), ("prefill", max(3, args.repeats // 4))):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(repeats + 1):
            for name, side in sides.items():
                spent_ms = milliseconds(getattr(side, phase))
                if turn:  # the first turn warms up
                    times[name].append(spent_ms)
        for name, values in times.items():
            result[f"{name}_{phase}_ms"] = round(statistics.median(values), 2)
            result[f"{name}_{phase}_min_ms"] = round(min(values), 2)
        if len(sides) == 2:
            ratio = result[f"transformers_{phase}_ms"] / result[f"rayllm_{phase}_ms"]
            result[f"{phase}_ratio"] = round(ratio, 2)
        result[f"{phase}_shares"] = shares(getattr(sides["rayllm"], phase), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
