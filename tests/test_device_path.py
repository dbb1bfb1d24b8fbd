"""The path of a GPU from requests to tokens, on a CPU: device rows, kernels in Triton's interpreter, the backend that
reads pages where they are. It gives the tokens of the CPU's path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_checkpoint
from triton_interpreter import corrected

from rayllm import LLM, SamplingParams, StructuredOutputsParams
from rayllm.request import RequestOutput
from rayllm_kernels.device import interpreted

SHARED = list(range(10, 38))
PROMPTS = [
    [5, 6, 7],
    [*SHARED, 100],
    [*SHARED, 100, 101, 102],
    list(range(60, 88)),
    [*SHARED, 100],
    [9, 8],
    [*SHARED[:9]],
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=2, top_k=20, top_p=0.9, max_tokens=8, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=7, repetition_penalty=1.3, presence_penalty=0.5, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, min_p=0.05, max_tokens=8, ignore_eos=True),
    SamplingParams(
        temperature=0.8, seed=4, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[a-f]{20}")
    ),
    SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1, bad_words_token_ids=((7,), (8, 9)), ignore_eos=True),
]


@contextlib.contextmanager
def _llm(path: Path, **settings: Any) -> Iterator[LLM]:
    sizes = {"block_size": 16, "max_num_batched_tokens": 16, "max_model_len": 64}
    with LLM(str(path), device="cpu", **{**sizes, **settings}) as llm:
        yield llm


def _tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.kernels) for name in ("qwen3", "opt"))]
)
def test_a_chunked_prompt_beside_a_running_row_gives_the_tokens_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    """Grouped heads; norms of queries and keys; layer norms, biases and learned positions."""
    path = make_checkpoint(tmp_path, architecture)
    prompts = [PROMPTS[0], PROMPTS[3][:18]]
    params = [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), SamplingParams(seed=7, max_tokens=2)]
    with _llm(path, num_kv_blocks=8) as llm:
        expected = _tokens(llm.generate(prompts, params))
    with corrected(), interpreted(), _llm(path, num_kv_blocks=8) as llm:
        assert _tokens(llm.generate(prompts, params)) == expected


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("window", "num_kv_blocks"),
    [pytest.param(None, 5, id="full"), pytest.param(24, 5, id="window")],
)
def test_tokens_are_those_of_the_cpu_with_chunks_preemption_and_prefix_hits(
    llama_path: Path, tmp_path: Path, window: int | None, num_kv_blocks: int
) -> None:
    path = llama_path if window is None else make_checkpoint(tmp_path, "mistral", sliding_window=window)
    with _llm(path, num_kv_blocks=num_kv_blocks) as llm:
        expected = [_tokens(llm.generate(PROMPTS, PARAMS)) for _ in range(2)]
    with corrected(), interpreted(), _llm(path, num_kv_blocks=num_kv_blocks) as llm:
        found = [_tokens(llm.generate(PROMPTS, PARAMS)) for _ in range(2)]
        stats = llm.stats()
    assert found == expected
    assert stats.num_preemptions > 0
    assert stats.prefix_hits > 0
