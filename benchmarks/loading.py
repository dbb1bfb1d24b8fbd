"""Loading a checkpoint of random weights from a warm file cache: bytes, seconds and memory of each rank.

    python benchmarks/loading.py [--size 2GB] [--tp 1 2] [--dtypes bfloat16 float16] [--repeat 3] [--folder FOLDER]

Each rank is a process of its own, with its share of the cores; all begin at once, after their imports. The checkpoint
is read by `cat` and by the ranks in turn. Prints a table, medians of the rounds, and one line of JSON:

    read       bytes of the weights that a rank read, in GB
    seconds    until its share of the model is ready, its weights packed for this CPU's products
    cpu s      CPU seconds of that, of all its threads; `cat cpu`: those of `cat` for all files
    of cat     bytes/s of all ranks together, by those of `cat FILES > /dev/null`
    memory     the most memory that a rank took for loading, in GB
    of file    the part of what it holds after loading that is the file's own pages, shared with whoever reads it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_GB = 1e9
_WIDTH, _INNER, _VOCAB = 2048, 5632, 32000
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LAYER = {
    "self_attn.q_proj": (_WIDTH, _WIDTH),
    "self_attn.k_proj": (256, _WIDTH),
    "self_attn.v_proj": (256, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH),
    "mlp.gate_proj": (_INNER, _WIDTH),
    "mlp.up_proj": (_INNER, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INNER),
    "input_layernorm": (_WIDTH,),
    "post_attention_layernorm": (_WIDTH,),
}


def num_bytes_of(text: str) -> int:
    """`2GB`, `500MB`."""
    found = re.fullmatch(r"([\d.]+)(MB|GB)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 500MB or 2GB")
    return int(float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]])


def make_checkpoint(folder: Path, num_bytes: int, dtype: str) -> None:
    """Of TinyLlama's shape, with as many layers as come nearest to that size, one at least; two files and an index."""
    import torch
    from safetensors.torch import save_file

    def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCAB, _WIDTH)}
        for layer in range(num_layers):
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LAYER.items()}
        return found | {"model.norm.weight": (_WIDTH,), "lm_head.weight": (_VOCAB, _WIDTH)}

    width = getattr(torch, dtype).itemsize
    of_layer = width * sum(torch.Size(shape).numel() for shape in _LAYER.values())
    num_layers = max(1, round((num_bytes - 2 * width * _VOCAB * _WIDTH) / of_layer))
    torch.manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(-0.03, 0.03)
        for name, shape in shapes(num_layers).items()
    }
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": num_layers, "dtype": dtype}))


def cat_s(folder: Path) -> tuple[float, float]:
    """Seconds that `cat` takes for the weight files, by the clock and of CPU."""
    files = sorted(map(str, folder.glob("*.safetensors")))
    began_s, cpu_s = time.perf_counter(), child_cpu_s()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began_s, child_cpu_s() - cpu_s


def child_cpu_s() -> float:
    """CPU seconds of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def memory(field: str) -> int:
    """Bytes, by a name of /proc/self/status: VmRSS, VmHWM (its maximum), RssFile."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def load_rank(folder: Path, rank: int, size: int, num_threads: int) -> Iterator[dict[str, Any]]:
    """Imports, yields once; then loads and yields what that took."""
    import torch

    from rayllm.distributed.groups import TensorParallel
    from rayllm.models import build_model
    from rayllm.models.registry import read_spec, weight_names
    from rayllm.weights.checkpoint import Checkpoint
    from rayllm.weights.checkpoint_weights import CheckpointWeights

    torch.set_num_threads(num_threads)
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    yield {}
    before, of_file = memory("VmRSS"), memory("RssFile")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the maximum begins anew
    began_s, cpu_s = time.perf_counter(), time.process_time()
    spec, device = read_spec(folder), torch.device("cpu")
    checkpoint, dtype = Checkpoint(folder), getattr(torch, spec.dtype)
    weights = CheckpointWeights(checkpoint, weight_names(spec), dtype, device)
    model = build_model(spec, weights, TensorParallel(rank, size), dtype, device)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    del weights
    yield {
        "bytes_read": checkpoint.bytes_read,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "memory": memory("VmHWM") - before,
        "memory_of_file": max(0, memory("RssFile") - of_file),
        "num_layers": model.decoder.spec.num_layers,
    }


def rank_process(folder: Path, rank: int, size: int, num_threads: int) -> None:
    """Says a line when it has its imports, waits for a line, says what loading took."""
    steps = load_rank(folder, rank, size, num_threads)
    print(json.dumps(next(steps)), flush=True)
    sys.stdin.readline()
    print(json.dumps(next(steps)), flush=True)


def load_ranks(folder: Path, size: int) -> list[dict[str, Any]]:
    """All ranks at once, each in a process."""
    num_threads = max(1, (os.cpu_count() or 1) // size)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--folder", str(folder), "--rank", f"{rank}/{size}/{num_threads}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate()[0] for process in processes]
    if not all(found):
        raise SystemExit("a rank failed: its error is above")
    return [json.loads(text) for text in found]


def measure(folder: Path, sizes: list[int], repeat: int) -> list[dict[str, Any]]:
    """A row for each number of ranks and each rank."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cat_s(folder)  # the cache is warm from here on
    rows = []
    for size in sizes:
        rounds = [(cat_s(folder), load_ranks(folder, size)) for _ in range(repeat)]
        ratios = [
            sum(rank["bytes_read"] for rank in ranks) / max(rank["seconds"] for rank in ranks) * cat / num_bytes
            for (cat, _), ranks in rounds
        ]
        cat = {"cat_s": [times[0] for times, _ in rounds], "cat_cpu_s": [times[1] for times, _ in rounds]}
        for number in range(size):
            of_rank = [ranks[number] for _, ranks in rounds]
            row = {key: statistics.median(each[key] for each in of_rank) for key in of_rank[0]}
            row |= {key: statistics.median(times) for key, times in cat.items()}
            rows.append({"tp": size, "rank": number, **row, "ratio_to_cat": statistics.median(ratios)})
    return rows


def row_text(row: dict[str, Any]) -> str:
    gigabytes = {key: row[key] / _GB for key in ("bytes_read", "memory", "memory_of_file")}
    return (
        f"{row['tp']:>4}{row['rank']:>6}{gigabytes['bytes_read']:>8.2f}{row['seconds']:>9.2f}{row['cpu_s']:>7.2f}"
        f"{row['cat_s']:>7.2f}{row['cat_cpu_s']:>9.2f}{row['ratio_to_cat']:>8.0%}{gigabytes['memory']:>8.2f}"
        f"{gigabytes['memory_of_file']:>9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=num_bytes_of, default="2GB")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float16"]
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, and kept")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_process(options.folder, *map(int, options.rank.split("/")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print("dtype       tp  rank    read  seconds  cpu s  cat s  cat cpu  of cat  memory  of file")
        found: dict[str, list[dict[str, Any]]] = {}
        for dtype in options.dtypes:
            folder = (options.folder or Path(temporary)) / f"{dtype}-{options.size}"
            if not folder.exists():
                folder.mkdir(parents=True)
                make_checkpoint(folder, options.size, dtype)
            found[dtype] = measure(folder, options.tp, options.repeat)
            for row in found[dtype]:
                print(f"{dtype:<10}{row_text(row)}")
    print(json.dumps({"benchmark": "loading", "size": options.size, "repeat": options.repeat, "rows": found}))


if __name__ == "__main__":
    main()
