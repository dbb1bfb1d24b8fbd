from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import ray

from rayllm import LLM, AsyncLLM, SamplingParams, get_engine
from rayllm.async_engine import AsyncEngine
from rayllm.engine.discovery import find_driver
from rayllm.errors import EngineError, EngineUnreachableError, RequestError
from rayllm.remote import RemoteEngine
from rayllm.request import RequestOutput

SETTINGS = {"device": "cpu", "max_model_len": 256, "num_kv_blocks": 200, "max_num_seqs": 32}
PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], list(range(30, 60))]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1, seed=3, max_tokens=15, n=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=10),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1),
]


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    last = None
    async for output in outputs:
        last = output
    assert last is not None
    return last


def _said(output: RequestOutput) -> list[object]:
    return [(c.text, c.token_ids, c.finish_reason, len(c.logprobs or ())) for c in output.outputs]


async def _check_against_solo(engine: AsyncEngine | RemoteEngine, solo: list[list[list[int]]]) -> None:
    """64 requests at once, each with the tokens of its solo run."""
    outputs = await asyncio.gather(
        *(_last(engine.generate(PROMPTS[i % 4], PARAMS[i % 4], request_id=f"r{i}")) for i in range(64))
    )
    for i, output in enumerate(outputs):
        assert output.finished
        assert output.request_id == f"r{i}"
        assert [choice.token_ids for choice in output.outputs] == solo[i % 4]


@pytest.fixture(scope="module")
def solo(llama_path: Path) -> list[list[list[int]]]:
    with LLM(str(llama_path), **SETTINGS) as llm:
        return [
            [choice.token_ids for choice in llm.generate([prompt], params)[0].outputs]
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]


async def test_many_requests_at_once_equal_their_solo_runs(llama_path: Path, solo: list[list[list[int]]]) -> None:
    async with AsyncLLM(str(llama_path), distributed_executor_backend="inproc", **SETTINGS) as engine:
        await _check_against_solo(engine, solo)
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)


async def test_a_stream_adds_up_and_leaving_it_frees_its_blocks(llama_path: Path) -> None:
    async with AsyncLLM(str(llama_path), distributed_executor_backend="inproc", **SETTINGS) as engine:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        whole = await _last(engine.generate([5, 6, 7], params))
        parts = [part async for part in engine.stream([5, 6, 7], params)]
        assert "".join(part.text for part in parts) == whole.outputs[0].text
        outputs = engine.generate([5, 6, 7], params.with_(max_tokens=200))
        assert not (await outputs.__anext__()).finished
        await outputs.aclose()  # type: ignore[attr-defined]
        for _ in range(100):
            stats = await engine.stats()
            if stats.num_blocks_used == 0:
                break
        assert stats.num_blocks_used == 0


async def test_a_bad_request_harms_no_other(llama_path: Path) -> None:
    async with AsyncLLM(str(llama_path), distributed_executor_backend="inproc", **SETTINGS) as engine:
        with pytest.raises(RequestError, match="out of vocabulary, which has 288 tokens"):
            await _last(engine.generate([5, 288]))
        assert (await _last(engine.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True)))).finished


async def test_a_closed_engine_says_so(llama_path: Path) -> None:
    engine = AsyncLLM(str(llama_path), distributed_executor_backend="inproc", **SETTINGS)
    await engine.close()
    with pytest.raises((EngineError, EngineUnreachableError)):
        await _last(engine.generate([5, 6]))


@pytest.mark.cluster
async def test_two_workers_serve_this_program_and_other_jobs_by_name(
    ray_cluster: None, llama_path: Path, solo: list[list[list[int]]]
) -> None:
    async with AsyncLLM(str(llama_path), tensor_parallel_size=2, name="shared", **SETTINGS) as engine:
        await _check_against_solo(engine, solo)
        async with get_engine("shared") as found:
            assert found.config == engine.config
            assert found.driver is not None
            await _check_against_solo(found, solo)
        assert (await engine.stats()).num_blocks_used == 0
    with pytest.raises(EngineUnreachableError, match="no engine named 'shared'"):
        await get_engine("shared")


@pytest.mark.cluster
async def test_requests_of_a_program_and_of_other_jobs_outlive_the_driver(ray_cluster: None, llama_path: Path) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=200, ignore_eos=True),
        SamplingParams(temperature=1, seed=3, max_tokens=150, n=2, logprobs=1, ignore_eos=True),
    ]
    async with (
        AsyncLLM(str(llama_path), name="mortal", distributed_executor_backend="ray", **SETTINGS) as own,
        get_engine("mortal") as other,
    ):
        expected = [await _last(own.generate(PROMPTS[0], param)) for param in params]
        first = other.driver
        before = await first.describe.remote()
        streams = [engine.generate(PROMPTS[0], param) for engine in (own, other) for param in params]
        for stream in streams:
            assert not (await stream.__anext__()).finished
        os.kill(before.driver.pid, signal.SIGKILL)
        outputs = await asyncio.gather(*map(_last, streams))
        assert [_said(output) for output in outputs] == [_said(output) for output in expected * 2]
        assert other.driver != first
        after = await other.driver.describe.remote()
        assert after.driver.pid != before.driver.pid
        assert (await own.stats()).num_blocks_used == 0


@pytest.mark.cluster
def test_a_blocking_program_outlives_its_driver(ray_cluster: None, llama_path: Path) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=200, n=2, ignore_eos=True)
    with LLM(str(llama_path), name="blocking", distributed_executor_backend="ray", **SETTINGS) as llm:
        [whole] = llm.generate([PROMPTS[0]], params)
        stream = llm.stream(PROMPTS[0], params)
        parts = [next(stream)]
        os.kill(ray.get(find_driver("blocking").describe.remote()).driver.pid, signal.SIGKILL)
        parts += stream
        for choice in whole.outputs:
            assert [i for part in parts if part.index == choice.index for i in part.token_ids] == choice.token_ids
        assert llm.stats().num_blocks_used == 0
