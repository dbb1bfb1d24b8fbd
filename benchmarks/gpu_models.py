"""Whole models of `gpu.py`: decode steps, offline throughput, `transformers` beside it, and a killed worker.

Weights are random, in the shapes of the models; no checkpoint is read and no Ray is used. With `--smoke` all shapes are
tiny.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_report import Row

_LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
_QWEN3_8B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
}
_GLM_4_9B = {
    "model_type": "glm",
    "architectures": ["GlmForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "vocab_size": 151552,
}
_COMMON = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 288,
}

DECODE_TARGETS_MS = {1: 4.4, 32: 6.0, 128: 10.0, 256: 17.0}
"""Of a decode step with Llama-3-8B's shapes at context 1024, on one H200."""
_CONTEXT = 1024
_NUM_TIMED_STEPS = 40
_NUM_STREAMED = 20
"""Tokens before the kill."""


@contextmanager
def _model(fields: dict[str, Any], bench: Bench) -> Iterator[Path]:
    """A folder with the config.json of these shapes."""
    with tempfile.TemporaryDirectory() as folder:
        whole = {**_COMMON, **fields, **(_TINY if bench.is_smoke else {})}
        (Path(folder) / "config.json").write_text(json.dumps(whole))
        yield Path(folder)


def _settings(folder: Path, bench: Bench, **settings: Any) -> dict[str, Any]:
    """Of an engine in this process whose weights are drawn."""
    fixed = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "device": bench.device.type,
        "dtype": "float32" if bench.is_smoke else "bfloat16",
        "distributed_executor_backend": "inproc",
    }
    return {**fixed, **settings}


def free() -> None:
    """Gives memory of models that are gone back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class DecodeSteps:
    """A runner whose rows each have a context of so many tokens, and its decode steps. The driver is not in it."""

    def __init__(self, folder: Path, bench: Bench, max_rows: int, context: int):
        from rayllm.config import EngineConfig
        from rayllm.distributed.groups import TensorParallel
        from rayllm.engine.owner.resolve import resolve
        from rayllm.runner.runner import Runner

        self._context = context
        max_len = context + 4 * _NUM_TIMED_STEPS
        settings = _settings(folder, bench, max_num_seqs=max_rows, max_model_len=max_len, block_size=64)
        self._blocks_a_row = -(-max_len // 64)
        settings["num_kv_blocks"] = self._num_blocks = max_rows * self._blocks_a_row
        self._tp = TensorParallel()
        self._runner = Runner(resolve(EngineConfig.parse(settings)), self._tp, bench.device)
        self._step = 0

    def begin(self, num_rows: int) -> None:
        """Rows 0 to `num_rows` - 1, as if a prefix of all tokens but one had been found in the cache."""
        from rayllm.messages import RowParams, RowStart, RowTable
        from rayllm.request import pack_ids

        self._num_rows = num_rows
        self._runner.start(self._num_blocks)
        for caches in self._runner._pool().layers:
            for cache in caches:
                cache.normal_()
        tokens, params = pack_ids([7] * self._context), RowParams(temperature=0)
        per_row = self._blocks_a_row
        self._new = [
            RowStart(
                row,
                tokens,
                self._context,
                self._context - 1,
                [RowTable(pack_ids(range(row * per_row, (row + 1) * per_row)))],
                params,
                0,
                0,
            )
            for row in range(num_rows)
        ]

    def _plan(self) -> Any:
        from rayllm.messages import StepPlan
        from rayllm.request import pack_ids

        rows, ones, new = range(self._num_rows), [1] * self._num_rows, self._new
        self._new, self._step = [], self._step + 1
        return StepPlan(self._step, 0, b"", new, b"", b"", pack_ids(rows), pack_ids(ones), self._num_rows)

    def milliseconds(self, num_steps: int) -> float:
        """The median time from one step's result to the next, with the next step always launched before. The first
        steps are not timed: they compile, and record CUDA graphs."""
        for _ in range(4):
            self._runner.execute(self._plan())
        times_ms, in_flight = [], self._runner.launch(self._plan())
        before_s = time.perf_counter()
        for _ in range(num_steps):
            following = self._runner.launch(self._plan())
            result = self._runner.finish(in_flight)
            assert not result.invalid_rows, "the logits are no numbers"
            now_s, in_flight = time.perf_counter(), following
            times_ms.append((now_s - before_s) * 1e3)
            before_s = now_s
        self._runner.finish(in_flight)
        return statistics.median(times_ms)

    def check_no_wait(self) -> None:
        """RuntimeError where `launch` waits for the GPU, as torch can tell."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            in_flight = self._runner.launch(self._plan())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self._runner.finish(in_flight)

    def drop_graphs(self) -> None:
        """Steps run eagerly, until the next `begin`."""
        for release in self._tp.before_abort:
            release()


def decode_steps(bench: Bench) -> Iterator[Row]:
    sizes = [1, 2] if bench.is_smoke else sorted(DECODE_TARGETS_MS)
    context, num_steps = bench.size(_CONTEXT, 16), bench.size(_NUM_TIMED_STEPS, 2)
    with _model(_LLAMA_3_8B, bench) as folder:
        steps = DecodeSteps(folder, bench, sizes[-1], context)
        for num_rows in sizes:
            steps.begin(num_rows)
            ms = steps.milliseconds(num_steps)
            target = None if bench.is_smoke else DECODE_TARGETS_MS[num_rows]
            note = f"{num_rows / ms * 1e3:.0f} tok/s"
            yield Row(f"decode step, {num_rows} rows at context {context}", ms, "ms", at_most=target, note=note)
            if bench.device.type == "cuda":
                steps.check_no_wait()
                steps.drop_graphs()
                yield Row(f"decode step, {num_rows} rows, without graphs", steps.milliseconds(10), "ms")


def _generate_s(settings: dict[str, Any], num_prompts: int, prompt_len: int, output_len: int) -> float:
    """Seconds of `LLM.generate` for prompts of equal length whose answers have equal lengths, after a short warm-up."""
    from rayllm import LLM, SamplingParams

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (num_prompts, prompt_len), generator=generator)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    with LLM(**settings) as llm:
        # Twice the same number of rows as is timed: steps of their sizes are compiled and recorded.
        llm.generate(prompts, params.with_(max_tokens=min(output_len, 4)))
        llm.reset_prefix_cache()
        began_s = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed_s = time.perf_counter() - began_s
    assert all(len(output.outputs[0].token_ids) == output_len for output in outputs), "an answer was cut short"
    return elapsed_s


def throughput(bench: Bench) -> Iterator[Row]:
    num_prompts, length = bench.size(256, 3), bench.size(1024, 8)
    with _model(_QWEN3_8B, bench) as folder:
        settings = _settings(folder, bench, max_model_len=2 * length + 8)
        elapsed_s = _generate_s(settings, num_prompts, length, length)
    rate = num_prompts * length / elapsed_s
    name = f"Qwen3-8B shapes, {num_prompts} x {length}/{length}, output"
    yield Row(name, rate, "tok/s", at_least=None if bench.is_smoke else 8500, note=f"{elapsed_s:.1f} s")


def beside_transformers(bench: Bench) -> Iterator[Row]:
    num_prompts, prompt_len, output_len = bench.size(25, 2), bench.size(64, 6), bench.size(128, 4)
    num_tokens = num_prompts * (prompt_len + output_len)
    shape = f"GLM-4-9B shapes, {num_prompts} x {prompt_len}/{output_len}"
    with _model(_GLM_4_9B, bench) as folder:
        dtype = "float32" if bench.is_smoke else "float16"
        settings = _settings(folder, bench, max_model_len=512, dtype=dtype)
        ours_s = _generate_s(settings, num_prompts, prompt_len, output_len)
        free()
        yield Row(f"{shape}, RayLLM", num_tokens / ours_s, "tok/s")
        theirs_s = _transformers_s(folder, bench, getattr(torch, dtype), num_prompts, prompt_len, output_len)
    yield Row(f"{shape}, transformers", num_tokens / theirs_s, "tok/s")
    target = None if bench.is_smoke else 4
    yield Row(f"{shape}, ratio", theirs_s / ours_s, "times", at_least=target)


def _transformers_s(
    folder: Path, bench: Bench, dtype: torch.dtype, num_prompts: int, prompt_len: int, output_len: int
) -> float:
    """Seconds of `generate` on one batch, after a short warm-up."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(bench.device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
        ids = torch.randint(3, 250, (num_prompts, prompt_len))

    def generate(num_tokens: int) -> None:
        fixed = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)
        assert out.shape[1] == prompt_len + num_tokens

    with torch.inference_mode():
        generate(2)
        began_s = time.perf_counter()
        generate(output_len)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s


class Child:
    """A process that computes one request, and prints each of its tokens as a line. Until it is told to, it has only
    imported what it needs, as a standby worker has."""

    def __init__(self, folder: Path, bench: Bench):
        settings = _settings(folder, bench, max_model_len=512, max_num_seqs=4, num_kv_blocks=64, block_size=64)
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--child", json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the worker process ended with exit code {self._process.wait()}")
        return line

    def _expect(self, word: str) -> None:
        while self._line() != word:  # a library may print lines of its own
            pass

    def begin(self, tokens: list[int]) -> None:
        """Loads the model and continues these tokens; returns when it is loaded."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(tokens) + "\n")
        self._process.stdin.flush()
        self._expect("loaded")

    def token(self) -> int:
        while not (line := self._line()).isdecimal():
            pass
        return int(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def run_child(settings: dict[str, Any]) -> None:
    """What a `Child` does in its process."""
    import rayllm.runner.runner  # noqa: F401
    from rayllm import LLM, SamplingParams

    print("ready", flush=True)
    tokens = json.loads(sys.stdin.readline())
    with LLM(**settings) as llm:
        print("loaded", flush=True)
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False)
        for delta in llm.stream({"prompt_token_ids": tokens}, params):
            for token in delta.token_ids:
                print(token, flush=True)


def killed_worker(bench: Bench) -> Iterator[Row]:
    """A worker is killed in the midst of an answer, and a process that waits beside it takes over: it loads the
    weights, computes the prompt and the tokens so far again, and goes on."""
    tokens = list(range(10, 74))
    num_prompt = len(tokens)
    with _model(_LLAMA_3_8B, bench) as folder:
        children = [Child(folder, bench)]
        try:
            children[0].begin(tokens)
            for _ in range(_NUM_STREAMED):
                tokens.append(children[0].token())
            children.append(Child(folder, bench))
            killed_s = time.perf_counter()
            children[0].kill()
            children[1].begin(tokens)
            loaded_s = time.perf_counter()
            following = [children[1].token()]
            next_s = time.perf_counter()
            following.append(children[1].token())
        finally:
            for child in children:
                child.kill()
    yield Row("worker killed: until the other has loaded the weights", loaded_s - killed_s, "s")
    target = None if bench.is_smoke else 4
    note = f"after {len(tokens) - num_prompt} tokens"
    yield Row("worker killed: until the next token", next_s - killed_s, "s", at_most=target, note=note)
