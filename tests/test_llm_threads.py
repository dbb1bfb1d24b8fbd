"""One `LLM`, and one `AsyncLLM`, for any number of threads; and for none once it is closed, or in a forked child."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from rayllm.errors import EngineError
from rayllm.request import RequestOutput

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "num_kv_blocks": 400,
    "max_num_seqs": 16,
    "distributed_executor_backend": "inproc",
}
PROMPTS = ["Hello", "What is RayLLM?", "Tell me a story.", "One two three"]
PARAMS = SamplingParams(temperature=1, seed=5, max_tokens=16, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
Solo = dict[str, list[int]]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def solo(llm: LLM) -> Solo:
    """Each prompt's tokens when it is alone."""
    return {prompt: _ids(llm.generate(prompt, PARAMS)) for prompt in PROMPTS}


def _ids(outputs: list[RequestOutput]) -> list[int]:
    [output] = outputs
    return output.outputs[0].token_ids


def _in_threads(*works: Callable[[], object]) -> list[object]:
    """What each of the works returns or raises, all of them at once."""
    found: list[object] = [None] * len(works)

    def run(place: int) -> None:
        try:
            found[place] = works[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a thread hangs"
    return found


def _await_idle(llm: LLM) -> None:
    deadline = time.monotonic() + 30
    while llm.stats().num_blocks_used:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_get_the_answers_that_they_get_alone(llm: LLM, solo: Solo) -> None:
    def work(prompt: str) -> bool:
        answers = [_ids(llm.generate(prompt, PARAMS)) for _ in range(2)]
        answers.append([i for part in llm.stream(prompt, PARAMS) for i in part.token_ids])
        stream = llm.stream(prompt, PARAMS)
        first = next(stream)
        answers.append(_ids(llm.generate(prompt, PARAMS)))  # inside a stream's loop
        answers.append(first.token_ids + [i for part in stream for i in part.token_ids])
        return answers == [solo[prompt]] * 5

    assert _in_threads(*(lambda prompt=prompt: work(prompt) for prompt in PROMPTS)) == [True] * 4
    _await_idle(llm)


def test_open_streams_are_interleaved_and_left_as_one_likes(llm: LLM, solo: Solo) -> None:
    left, kept, dropped = (llm.stream(prompt, PARAMS) for prompt in PROMPTS[:3])
    ids = next(kept).token_ids
    next(left)
    next(dropped)
    left.close()
    assert list(left) == []
    del dropped
    gc.collect()
    assert ids + [i for part in kept for i in part.token_ids] == solo[PROMPTS[1]]
    _await_idle(llm)


def test_a_stream_that_another_thread_closes_ends(llm: LLM) -> None:
    stream = llm.stream("Hello", LONG)
    next(stream)
    closing = threading.Timer(0.1, stream.close)
    closing.start()
    num_tokens = sum(len(part.token_ids) for part in stream)
    assert num_tokens < 199
    closing.join()
    _await_idle(llm)


def test_ctrl_c_ends_the_call_that_it_interrupts_and_no_other(llm: LLM, solo: Solo) -> None:
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(_ids(llm.generate("Hello", LONG))))
    other.start()
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Tell me a story."] * 60, LONG)
    other.join(90)
    assert found == [_ids(llm.generate("Hello", LONG))]
    _await_idle(llm)
    assert _ids(llm.generate("Hello", PARAMS)) == solo["Hello"]


def test_a_forked_child_is_told_so_and_its_parent_goes_on(llm: LLM, solo: Solo) -> None:
    stream = llm.stream("Hello", PARAMS)
    ids = next(stream).token_ids
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for use in (lambda: llm.generate("Hello"), llm.stats, lambda: list(stream), llm.get_tokenizer):
            try:
                use()
                said.append("no error")
            except EngineError as error:
                said.append(error.code)
        llm.close()
        os.write(writer, " ".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4096).decode().split() == ["engine_forked"] * 4
    os.close(reader)
    os.close(writer)
    assert ids + [i for part in stream for i in part.token_ids] == solo["Hello"]


def test_close_ends_the_calls_of_other_threads_and_every_later_one() -> None:
    llm = LLM(**SETTINGS)
    stream = llm.stream("Hello", LONG)
    next(stream)

    def close() -> None:
        time.sleep(0.2)
        llm.close()

    ended, _ = _in_threads(lambda: llm.generate(["Hello"] * 16, LONG), close)
    message = [{"role": "user", "content": "x"}]
    uses: list[Callable[[], object]] = [
        lambda: llm.generate("x"),
        lambda: llm.chat(message),
        lambda: llm.stream("x"),
        lambda: list(stream),
        lambda: llm.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=2)),
        llm.stats,
        llm.get_tokenizer,
        llm.get_default_sampling_params,
        llm.reset_prefix_cache,
        llm.__enter__,
    ]
    for error in (ended, *_in_threads(*uses)):
        assert isinstance(error, EngineError), error
        assert str(error) == "this engine is closed: create a new LLM"
    llm.close()


def test_an_llm_that_is_garbage_ends_its_engine() -> None:
    llm = LLM(**SETTINGS)
    thread = llm._client.engine._thread
    llm.generate("Hello", PARAMS)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()


def test_beam_search_of_width_one_is_greedy_and_wider_ones_are_ordered(llm: LLM) -> None:
    greedy = llm.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    narrow = llm.beam_search(PROMPTS[:2], BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    for output, expected in zip(narrow, greedy, strict=True):
        assert output.sequences[0].tokens == expected.prompt_token_ids + expected.outputs[0].token_ids
        assert str(output.sequences[0].text).endswith(expected.outputs[0].text)
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    [wide] = llm.beam_search([{"prompt": "Hello"}], params, concurrency_limit=1)
    scores = [beam.cum_logprob for beam in wide.sequences]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(beam.tokens) for beam in wide.sequences}) == 4


def test_a_prefix_cache_that_is_reset_is_empty(llm: LLM) -> None:
    prompt = [7] * 64
    llm.generate([prompt], PARAMS)
    [cached] = llm.generate([prompt], PARAMS)
    assert cached.metrics.num_cached_tokens > 0
    assert llm.reset_prefix_cache() is True
    [computed] = llm.generate([prompt], PARAMS)
    assert computed.metrics.num_cached_tokens == 0
    assert computed.outputs[0].token_ids == cached.outputs[0].token_ids


async def _last(engine: AsyncLLM, prompt: str) -> list[int]:
    ids: list[int] = []
    async for output in engine.generate(prompt, PARAMS):
        ids = output.outputs[0].token_ids
    return ids


def test_an_async_llm_serves_several_event_loops(solo: Solo) -> None:
    engine = AsyncLLM(**SETTINGS)
    for _ in range(2):  # one loop after another
        assert asyncio.run(_last(engine, "Hello")) == solo["Hello"]
    works = (lambda prompt=prompt: asyncio.run(_last(engine, prompt)) for prompt in PROMPTS)
    assert _in_threads(*works) == [solo[prompt] for prompt in PROMPTS]
    asyncio.run(engine.close())
    asyncio.run(engine.close())


def test_a_closed_async_llm_says_so_in_every_loop(solo: Solo) -> None:
    engine = AsyncLLM(**SETTINGS)
    begun = threading.Event()

    async def stream() -> None:
        async for _ in engine.stream("Hello", LONG):
            begun.set()

    async def close() -> None:
        await asyncio.to_thread(begun.wait, 30)
        await engine.close()

    ended, _ = _in_threads(lambda: asyncio.run(stream()), lambda: asyncio.run(close()))
    uses = (_last(engine, "Hello"), engine.stats(), engine.reset_prefix_cache())
    for error in (ended, *_in_threads(*(lambda use=use: asyncio.run(use) for use in uses))):
        assert isinstance(error, EngineError), error
        assert str(error) == "this engine is closed: create a new LLM"


def test_chats_take_parts_tools_and_several_conversations(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "RayLLM?"}]}]
    begun = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, I"}]
    with_tools, _ = llm.chat([parts, parts], PARAMS, tools=[tool])
    assert "weather" in str(with_tools.prompt)
    assert "RayLLM?" in str(with_tools.prompt)
    [continued] = llm.chat(begun, PARAMS, continue_final_message=True, add_generation_prompt=False)
    assert str(continued.prompt).endswith("Hi, I")
