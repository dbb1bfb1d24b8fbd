"""`rayllm bench throughput`: offline throughput: requests and tokens per second, by RayLLM or by `transformers`.

Both backends get the same token ids, weights and dtype, and must emit every token asked for. Flags and output are those
of vLLM's `benchmark_throughput.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayllm.cli.bench.stats import add_count_flags, check_at_least
from rayllm.cli.bench.workload import Workload, random_workload, read_sharegpt
from rayllm.cli.flags import Parser, UsageError, add_config_flags
from rayllm.config import EngineConfig, ResolvedConfig

ENGINE_FLAGS = (
    "model",
    "tokenizer",
    "revision",
    "download_dir",
    "trust_remote_code",
    "quantization",
    "dtype",
    "device",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enforce_eager",
    "cuda_graphs",
    "kv_cache_dtype",
    "distributed_executor_backend",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_kv_blocks",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "load_format",
)
_SAMPLE_PERIOD_S = 0.05


@dataclass
class Stats:
    """What a run of a workload took, for each repeat, and what else was seen."""

    workload: Workload
    elapsed_s: list[float]
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Medians over the repeats, and the spread: (slowest - fastest) / median."""
        median_s = statistics.median(self.elapsed_s)
        num_requests = len(self.workload.prompts)
        num_output = self.workload.num_output_tokens
        return {
            "elapsed_time": round(median_s, 4),
            "num_requests": num_requests,
            "total_num_tokens": self.workload.num_tokens,
            "requests_per_second": round(num_requests / median_s, 4),
            "tokens_per_second": round(self.workload.num_tokens / median_s, 2),
            "output_tokens_per_second": round(num_output / median_s, 2),
            "repeats_s": [round(elapsed, 4) for elapsed in self.elapsed_s],
            "spread": round((max(self.elapsed_s) - min(self.elapsed_s)) / median_s, 4),
            **self.details,
        }


def timed(run: Callable[[], None], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs."""
    elapsed = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - start)
    return elapsed


# ------------------------------------------------------------------------------------------------------- backends


def run_rayllm(engine: EngineConfig, workload: Workload, repeat: int) -> Stats:
    """Times `LLM.generate` after a short warm-up; then one more run, not timed, looks at how full blocks are."""
    from rayllm import LLM, SamplingParams
    from rayllm.engine.client.outputs import raise_failed

    num_samples = workload.num_samples
    one = SamplingParams(ignore_eos=True, detokenize=False, n=num_samples, temperature=0 if num_samples == 1 else 1)
    params = [one.with_(max_tokens=length) for length in workload.output_lens]
    with LLM(**engine.model_dump(exclude_unset=True)) as llm:
        llm.generate(workload.prompts[:1], one.with_(max_tokens=min(4, workload.output_lens[0])))

        def run() -> None:
            outputs = llm.generate(workload.prompts, params)
            for output, length in zip(outputs, workload.output_lens, strict=True):
                for choice in output.outputs:
                    raise_failed(choice)
                    assert len(choice.token_ids) == length

        before = llm.stats()
        elapsed = timed(run, repeat)
        after = llm.stats()
        config: ResolvedConfig = llm.config
        num_steps = after.num_steps - before.num_steps
        waited_s = after.step_wait_s - before.step_wait_s
        details = {
            "dtype": config.dtype,
            "device": config.device,
            "executor": config.backend,
            "num_steps": num_steps // repeat,
            "step_ms": round(1000 * sum(elapsed) / max(1, num_steps), 3),
            # In one process nobody waits for a plan: planning is a part of the step itself.
            "driver_share_of_step": round(waited_s / sum(elapsed), 4) if config.backend == "ray" else None,
            "num_preemptions": after.num_preemptions - before.num_preemptions,
            "kv_slots_filled": _slots_filled(llm, run, config.block_size),
        }
    return Stats(workload, elapsed, details)


def _slots_filled(llm: Any, run: Callable[[], None], block_size: int) -> float | None:
    """The share of token slots that hold a token, in the blocks in use, on average while most sequences run."""
    samples: list[tuple[int, int, int]] = []
    engine = llm._client.engine.wait_until_made()
    receive, last = engine.receive, time.perf_counter()

    def observed(wake: Any) -> Any:
        nonlocal last
        deltas = receive(wake)
        if time.perf_counter() - last > _SAMPLE_PERIOD_S:
            last = time.perf_counter()
            stats = engine.stats()
            samples.append((stats.num_running, stats.num_slots_filled, stats.num_blocks_used * block_size))
        return deltas

    engine.receive = observed
    try:
        run()
    finally:
        engine.receive = receive
    most = max((running for running, _, _ in samples), default=0)
    at_most = [(filled, slots) for running, filled, slots in samples if running == most and slots]
    if not at_most:
        return None
    return round(sum(filled for filled, _ in at_most) / sum(slots for _, slots in at_most), 4)


def run_transformers(engine: EngineConfig, workload: Workload, repeat: int, max_batch_size: int) -> Stats:
    """Times `transformers` generate on full left-padded batches, every token forced."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from rayllm.config import count_cores
    from rayllm.engine.owner.resolve import resolve

    transformers_logging.disable_progress_bar()
    config = resolve(engine, backend="inproc")
    torch.set_num_threads(count_cores())
    dtype = getattr(torch, config.dtype)
    if engine.load_format == "dummy":
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_path), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            config.model_path, dtype=dtype, trust_remote_code=engine.trust_remote_code
        )
    model = model.to(config.device).eval()
    pad_id = model.generation_config.pad_token_id or 0

    def run(prompts: Sequence[list[int]], output_len: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=config.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=config.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=workload.num_samples > 1,
            num_return_sequences=workload.num_samples,
            use_cache=True,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=pad_id,
        )
        assert out.shape[1] == width + output_len

    def run_all() -> None:
        for start in range(0, len(workload.prompts), max_batch_size):
            part = slice(start, start + max_batch_size)
            run(workload.prompts[part], max(workload.output_lens[part]))

    with torch.inference_mode():
        run(workload.prompts[:1], min(4, workload.output_lens[0]))
        elapsed = timed(run_all, repeat)
    details = {"dtype": config.dtype, "device": config.device, "max_batch_size": max_batch_size}
    return Stats(workload, elapsed, details)


# --------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    made = Parser(prog="rayllm bench throughput", description="Time an offline batch of prompts.")
    text = "hf: transformers' generate; vllm: an alias of rayllm"
    made.add_argument("--backend", choices=("rayllm", "vllm", "hf", "mii"), default="rayllm", help=text)
    made.add_argument("--dataset", metavar="FILE", help="JSON file in ShareGPT format (default: random prompts)")
    counts = (
        ("--input-len", 64, "tokens per random prompt"),
        ("--num-prompts", 25, "requests"),
        ("--n", 1, "answers to each"),
        ("--seed", 0, "of the prompts"),
        ("--repeat", 3, "timed runs; medians are reported"),
    )
    add_count_flags(made, counts)
    text = "tokens to generate for each prompt (default: 128; with --dataset: as many as the reference answer has)"
    made.add_argument("--output-len", type=int, metavar="N", help=text)
    made.add_argument("--hf-max-batch-size", type=int, metavar="N", help="default: all prompts in one batch")
    made.add_argument("--json", action="store_true", help="also print one line of JSON")
    add_config_flags(made, EngineConfig, only=ENGINE_FLAGS)
    return made


def throughput(argv: Sequence[str]) -> dict[str, Any]:
    """Runs the benchmark that the arguments describe and returns its stats (see `Stats.summary`)."""
    given = parser().parse(argv)
    counts = (
        "input_len",
        "num_prompts",
        "n",
        "repeat",
        *(n for n in ("output_len", "hf_max_batch_size") if n in given),
    )
    check_at_least(given, 1, *counts)
    _check_backend(given)
    if "dataset" not in given:
        given.setdefault("output_len", 128)
    engine = engine_config(given)
    from rayllm.engine.owner.resolve import resolve
    from rayllm.weights.hub import ensure_downloaded

    ensure_downloaded(engine)
    workload = _workload(given, resolve(engine))
    if given["backend"] == "hf":
        max_batch_size = given.get("hf_max_batch_size") or len(workload.prompts)
        stats = run_transformers(engine, workload, given["repeat"], max_batch_size)
    else:
        stats = run_rayllm(engine, workload, given["repeat"])
    arguments = {name: given.get(name) for name in ("backend", "input_len", "output_len", "num_prompts", "seed")}
    return {**arguments, "model": given.get("model", ""), **stats.summary()}


def _check_backend(given: dict[str, Any]) -> None:
    if given["backend"] == "mii":
        raise UsageError("--backend mii is DeepSpeed-MII, which RayLLM does not include: give rayllm, vllm or hf")
    if given["backend"] == "vllm":
        print("--backend vllm measures RayLLM's engine; vLLM itself is not used", file=sys.stderr)
    if given["backend"] != "hf" and "hf_max_batch_size" in given:
        raise UsageError("--hf-max-batch-size is for --backend hf: give --max-num-seqs")


def _workload(given: dict[str, Any], config: ResolvedConfig) -> Workload:
    if "dataset" in given:
        from rayllm.text.tokenizer import Tokenizer

        workload = read_sharegpt(
            given["dataset"],
            Tokenizer.from_config(config).encode,
            num_prompts=given["num_prompts"],
            output_len=given.get("output_len"),
            seed=given["seed"],
            max_model_len=config.max_model_len,
        )
    else:
        workload = random_workload(
            num_prompts=given["num_prompts"],
            input_len=given["input_len"],
            output_len=given["output_len"],
            vocab_size=config.shape.vocab_size,
            seed=given["seed"],
        )
    return replace(workload, num_samples=given.get("n", 1))


def engine_config(given: dict[str, Any]) -> EngineConfig:
    """The engine that the flags of a benchmark describe; a random model is made where one is named."""
    from rayllm.cli.random_model import PREFIX, random_model

    settings = {name: given[name] for name in ENGINE_FLAGS if name in given}
    if "dataset" not in given:
        settings.setdefault("max_model_len", given["input_len"] + given["output_len"])
    model = str(settings.get("model", ""))
    if model.startswith(PREFIX):
        settings["model"] = str(random_model(model, with_weights=settings.get("load_format") != "dummy"))
    engine: EngineConfig = EngineConfig.parse(settings)
    return engine


def run(argv: Sequence[str]) -> int:
    """`rayllm bench throughput ...`."""
    stats = throughput(argv)
    print(f"Throughput: {stats['requests_per_second']:.2f} requests/s, {stats['tokens_per_second']:.2f} tokens/s")
    print(f"Output: {stats['output_tokens_per_second']:.2f} tokens/s")
    if "kv_slots_filled" in stats:
        waiting = _share(stats, "driver_share_of_step")
        print(
            f"Step: {stats['step_ms']:.2f} ms, workers waiting for the driver {waiting}; "
            f"KV slots filled in blocks in use {_share(stats, 'kv_slots_filled')}"
        )
    if "--json" in argv:
        print(json.dumps(stats))
    return 0


def _share(stats: dict[str, Any], name: str) -> str:
    return "not measured" if stats[name] is None else f"{stats[name]:.1%}"
