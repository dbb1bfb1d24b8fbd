"""`rayllm bench throughput`: requests and tokens a second of an offline batch, by RayLLM or by `transformers`.

Both backends get the same token ids, weights and dtype, and must emit every token asked for.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayllm.cli.bench.figures import add_count_flags, check_at_least
from rayllm.cli.flags import Parser, add_config_flags
from rayllm.config import EngineConfig, ResolvedConfig

ENGINE_FLAGS = (
    "model",
    "dtype",
    "device",
    "tensor_parallel_size",
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
_FIRST_PLAIN_ID = 4
"""Lower ids are special in the random models."""

_SAMPLE_PERIOD_S = 0.05


@dataclass(frozen=True)
class Workload:
    """`prompts` are token ids; each is continued by exactly `output_len` tokens."""

    prompts: list[list[int]]
    output_len: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + len(self.prompts) * self.output_len


@dataclass
class Figures:
    """What a run of a workload took, for each repeat, and what else was seen."""

    workload: Workload
    elapsed_s: list[float]
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Medians over the repeats, and the spread: (slowest - fastest) / median."""
        median_s = statistics.median(self.elapsed_s)
        num_requests = len(self.workload.prompts)
        num_output = num_requests * self.workload.output_len
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


def random_workload(*, num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> Workload:
    """Prompts of random ids; the same arguments give the same prompts."""
    ids = random.Random(seed)
    prompts = [[ids.randrange(_FIRST_PLAIN_ID, vocab_size) for _ in range(input_len)] for _ in range(num_prompts)]
    return Workload(prompts, output_len)


def timed(run: Callable[[], None], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs."""
    elapsed = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - start)
    return elapsed


# ------------------------------------------------------------------------------------------------------- backends


def run_rayllm(engine: EngineConfig, workload: Workload, repeat: int) -> Figures:
    """Times `LLM.generate` after a short warm-up; then one more run, not timed, looks at how full blocks are."""
    from rayllm import LLM, SamplingParams
    from rayllm.engine.outputs import raise_failed

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=workload.output_len, detokenize=False)
    with LLM(**engine.model_dump()) as llm:
        llm.generate(workload.prompts[:1], params.with_(max_tokens=min(4, workload.output_len)))

        def run() -> None:
            outputs = llm.generate(workload.prompts, params)
            for output in outputs:
                raise_failed(output.outputs[0])
            assert all(len(output.outputs[0].token_ids) == workload.output_len for output in outputs)

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
    return Figures(workload, elapsed, details)


def _slots_filled(llm: Any, run: Callable[[], None], block_size: int) -> float | None:
    """The share of token slots that hold a token, in the blocks in use, on average while most sequences run."""
    samples: list[tuple[int, int, int]] = []
    engine = llm._client.engine.engine
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


def run_transformers(engine: EngineConfig, workload: Workload, repeat: int, max_batch_size: int) -> Figures:
    """Times `transformers` generate on full left-padded batches, every token forced."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from rayllm.config import count_cores
    from rayllm.engine.resolve import resolve

    transformers_logging.disable_progress_bar()
    config = resolve(engine, backend="inproc")
    torch.set_num_threads(count_cores())
    dtype = getattr(torch, config.dtype)
    if engine.load_format == "dummy":
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_path), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=dtype)
    model = model.to(config.device).eval()
    pad_id = model.generation_config.pad_token_id or 0

    def run(prompts: Sequence[list[int]], output_len: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=config.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=config.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            use_cache=True,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=pad_id,
        )
        assert out.shape[1] == width + output_len

    def run_all() -> None:
        for start in range(0, len(workload.prompts), max_batch_size):
            run(workload.prompts[start : start + max_batch_size], workload.output_len)

    with torch.inference_mode():
        run(workload.prompts[:1], min(4, workload.output_len))
        elapsed = timed(run_all, repeat)
    details = {"dtype": config.dtype, "device": config.device, "max_batch_size": max_batch_size}
    return Figures(workload, elapsed, details)


# --------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    made = Parser(prog="rayllm bench throughput", description="Time an offline batch of random prompts.")
    made.add_argument("--backend", choices=("rayllm", "hf"), default="rayllm", help="hf: transformers' generate")
    counts = (
        ("--input-len", 64, "tokens of each prompt"),
        ("--output-len", 128, "tokens to generate for each"),
        ("--num-prompts", 25, "requests"),
        ("--seed", 0, "of the prompts"),
        ("--repeat", 3, "timed runs; medians are told"),
    )
    add_count_flags(made, counts)
    made.add_argument("--hf-max-batch-size", type=int, metavar="N", help="default: all prompts in one batch")
    made.add_argument("--json", action="store_true", help="print one JSON line too")
    add_config_flags(made, EngineConfig, only=ENGINE_FLAGS)
    return made


def throughput(argv: Sequence[str]) -> dict[str, Any]:
    """Runs the benchmark that the arguments describe and returns its figures (see `Figures.summary`)."""
    given = parser().parse(argv)
    check_at_least(given, 1, "input_len", "output_len", "num_prompts", "repeat")
    engine = engine_config(given)
    from rayllm.engine.resolve import resolve

    resolved = resolve(engine)
    workload = random_workload(
        num_prompts=given["num_prompts"],
        input_len=given["input_len"],
        output_len=given["output_len"],
        vocab_size=resolved.shape.vocab_size,
        seed=given["seed"],
    )
    if given["backend"] == "rayllm":
        figures = run_rayllm(engine, workload, given["repeat"])
    else:
        figures = run_transformers(
            engine, workload, given["repeat"], given.get("hf_max_batch_size") or given["num_prompts"]
        )
    told = {name: given[name] for name in ("backend", "input_len", "output_len", "num_prompts", "seed")}
    return {**told, "model": given.get("model", ""), **figures.summary()}


def engine_config(given: dict[str, Any]) -> EngineConfig:
    """The engine that the flags of a benchmark describe; a random model is made where one is named."""
    from rayllm.cli.random_model import PREFIX, random_model

    settings = {name: given[name] for name in ENGINE_FLAGS if name in given}
    settings.setdefault("max_model_len", given["input_len"] + given["output_len"])
    model = str(settings.get("model", ""))
    if model.startswith(PREFIX):
        settings["model"] = str(random_model(model, with_weights=settings.get("load_format") != "dummy"))
    engine: EngineConfig = EngineConfig.parse(settings)
    return engine


def run(argv: Sequence[str]) -> int:
    """`rayllm bench throughput ...`."""
    figures = throughput(argv)
    print(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.2f} tokens/s"
        f" ({figures['output_tokens_per_second']:.2f} output tokens/s)"
    )
    if "kv_slots_filled" in figures:
        waiting = _share(figures, "driver_share_of_step")
        print(
            f"Step: {figures['step_ms']:.2f} ms, workers waiting for the driver {waiting}; "
            f"KV slots filled in blocks in use {_share(figures, 'kv_slots_filled')}"
        )
    if "--json" in argv:
        print(json.dumps(figures))
    return 0


def _share(figures: dict[str, Any], name: str) -> str:
    return "not measured" if figures[name] is None else f"{figures[name]:.1%}"
