"""The same tokens however the work is cut: pool, chunk size, prefix cache, tensor parallelism, companions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny import make_checkpoint

from rayllm import LLM, SamplingParams, StructuredOutputsParams
from rayllm.layers.kv_cache import KVPool
from rayllm.models import Model
from rayllm.prompt.prompts import PreparedPrompt
from rayllm.request import RequestOutput, pack_ids, unpack_ids

SHARED = list(range(10, 74))
PROMPTS: list[list[int]] = [
    [5],
    [7, 8, 9],
    [*SHARED, 100],
    [*SHARED, 100, 101, 102],
    [*SHARED[:40], 111, 112],
    list(range(20, 137)),
    list(range(30, 46)),
    [*SHARED, 100],
    [*SHARED[:40], 111],
    [7, 8, 9],
    [*SHARED[:20], 9],
]
BAD_WORDS = tuple((i,) for i in range(0, 256, 2)) + tuple((i, j) for i in range(1, 256, 8) for j in range(1, 256, 8))
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=30),
    SamplingParams(temperature=1.1, seed=2, top_k=20, top_p=0.9, max_tokens=20, n=2),
    SamplingParams(temperature=0, max_tokens=33, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.7, seed=-3, min_p=0.05, max_tokens=17, frequency_penalty=0.4),
    SamplingParams(temperature=0, max_tokens=40, min_tokens=10, logit_bias={2: 4.0}),
    SamplingParams(temperature=1.0, seed=2**63 - 1, max_tokens=25, logprobs=3),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2),
    SamplingParams(
        seed=5,
        n=2,
        max_tokens=60,
        logprobs=1,
        structured_outputs=StructuredOutputsParams(
            json={"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 3, "maxItems": 5}
        ),
    ),
    SamplingParams(
        temperature=0,
        max_tokens=50,
        presence_penalty=1,
        structured_outputs=StructuredOutputsParams(regex="([a-z]{3,9} ){4}[0-9]{5}"),
    ),
    SamplingParams(temperature=1.5, seed=4, n=2, max_tokens=24, bad_words_token_ids=BAD_WORDS),
]
AMPLE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_blocks": 400,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
}
CUTS: dict[str, dict[str, Any]] = {
    "starved pool": {"num_kv_blocks": 14},
    "starved pool with prefix cache": {"num_kv_blocks": 14, "enable_prefix_caching": True},
    "chunks of 1": {"max_num_batched_tokens": 1},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 16, starved, prefix cache": {
        "max_num_batched_tokens": 16,
        "num_kv_blocks": 14,
        "enable_prefix_caching": True,
    },
    "prefix cache": {"enable_prefix_caching": True},
    "two at a time": {"max_num_seqs": 2, "enable_prefix_caching": True},
    "other block size": {"block_size": 4, "num_kv_blocks": 1600},
}


def _llm(path: Path, **settings: Any) -> LLM:
    return LLM(str(path), **{**AMPLE, "max_model_len": 200, "device": "cpu", **settings})


def _tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def _logprobs(outputs: list[RequestOutput]) -> list[float]:
    """Those of all tokens drawn, then of all prompt tokens where a request asks for them."""
    found = []
    for output in outputs:
        sequences = [(choice.token_ids, choice.logprobs) for choice in output.outputs]
        if output.prompt_logprobs is not None:
            sequences.append((output.prompt_token_ids[1:], output.prompt_logprobs[1:]))
        for token_ids, entries in sequences:
            assert entries is not None
            found += [entry[token_id].logprob for token_id, entry in zip(token_ids, entries, strict=True)]
    return found


@pytest.fixture(scope="module")
def alone(llama_path: Path) -> Iterator[list[list[list[int]]]]:
    """Each request by itself, in an ample pool, with no prefix cache."""
    with _llm(llama_path) as llm:
        yield [_tokens(llm.generate([prompt], params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def test_every_request_alone_is_not_trivial(alone: list[list[list[int]]]) -> None:
    assert all(len(set(choice)) > 3 for choices in alone for choice in choices)
    assert alone[2][0] != alone[2][1]
    assert alone[8][0] != alone[8][1]
    assert not any(word in BAD_WORDS for choice in alone[10] for word in [*zip(choice), *pairwise(choice)])


def test_among_others(llama_path: Path, alone: list[list[list[int]]]) -> None:
    with _llm(llama_path) as llm:
        assert _tokens(llm.generate(PROMPTS, PARAMS)) == alone


@pytest.mark.parametrize("name", CUTS)
def test_however_the_work_is_cut(llama_path: Path, alone: list[list[list[int]]], name: str) -> None:
    with _llm(llama_path, **CUTS[name]) as llm:
        for repetition in range(2):
            assert _tokens(llm.generate(PROMPTS, PARAMS)) == alone, f"repetition {repetition}"
        stats = llm.stats()
    assert stats.num_blocks_used == 0
    if "starved" in name:
        assert stats.num_preemptions > 0
    if "prefix cache" in name:
        assert stats.prefix_hits > 0


@contextlib.contextmanager
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All memory that is new, and all of the KV pool, is full of NaN; where it holds whole numbers, of the largest."""

    allocate_kv = Model.allocate_kv

    def allocate_full(model: Model, num_blocks: int, block_size: int) -> KVPool:
        pool = allocate_kv(model, num_blocks, block_size)
        for layer in pool.layers:
            for cache in layer:
                cache.fill_(torch.nan)
        return pool

    assert torch.utils.deterministic.fill_uninitialized_memory
    with monkeypatch.context() as patched:
        patched.setattr(Model, "allocate_kv", allocate_full)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [None, 24], ids=["full", "window"])
def test_what_memory_held_before(
    llama_path: Path, tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, and log-probabilities but for rounding, under preemption, prefix hits, and prefill beside decode."""
    path = llama_path if window is None else make_checkpoint(tmp_path, "mistral", sliding_window=window)
    prompts = PROMPTS[:8]
    params = [dataclasses.replace(params, logprobs=3) for params in PARAMS[:8]]

    cut = CUTS["chunks of 16, starved, prefix cache"]
    if window is not None:  # which starves with fewer
        cut = cut | {"num_kv_blocks": 7}

    def outputs() -> list[RequestOutput]:
        with _llm(path, **cut) as llm:
            found = [output for _ in range(2) for output in llm.generate(prompts, params)]
            stats = llm.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_hits > 0
        return found

    clean = outputs()
    with _poisoned_memory(monkeypatch):
        poisoned = outputs()
    assert [_tokens([output]) for output in poisoned] == [_tokens([output]) for output in clean]
    # The same sum may be rounded in another way each time: MKL shares its work out as it likes.
    assert _logprobs(poisoned) == pytest.approx(_logprobs(clean), abs=1e-4)


def test_order_of_arrival_does_not_matter(llama_path: Path, alone: list[list[list[int]]]) -> None:
    with _llm(llama_path, enable_prefix_caching=True) as llm:
        assert _tokens(llm.generate(PROMPTS[::-1], PARAMS[::-1])) == alone[::-1]


def test_continued_with_what_was_emitted(llama_path: Path, alone: list[list[list[int]]]) -> None:
    """As after a fault: the request comes again, with what its client has."""
    with _llm(llama_path) as llm:
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            kept = [choice[: len(choice) // 2 + n] for n, choice in enumerate(alone[i])]
            request = llm._client.request(PreparedPrompt(None, prompt), params)
            call = llm._client.engine.open([msgspec.structs.replace(request, emitted=tuple(map(pack_ids, kept)))])
            num_open = params.n
            while num_open:
                for delta in call.receive():
                    kept[delta.choice] += unpack_ids(delta.token_ids)
                    num_open -= delta.finish is not None
            assert kept == alone[i], params


@pytest.mark.cluster
@pytest.mark.parametrize(
    "cut",
    [{}, {"num_kv_blocks": 14, "max_num_batched_tokens": 16, "enable_prefix_caching": True}],
    ids=["ample", "starved"],
)
def test_two_tensor_parallel_workers(
    ray_cluster: None, llama_path: Path, alone: list[list[list[int]]], cut: dict[str, Any]
) -> None:
    with _llm(llama_path, tensor_parallel_size=2, name="invariance", **cut) as llm:
        assert _tokens(llm.generate(PROMPTS, PARAMS)) == alone
