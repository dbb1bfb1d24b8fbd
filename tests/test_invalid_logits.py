"""A request for which the model computes NaN ends alone: the real runner, with one broken token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayllm.config import EngineConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.local import LocalEngine
from rayllm.engine.owner.resolve import resolve
from rayllm.executor.inproc import InprocExecutor
from rayllm.messages import Finish
from rayllm.request import Request, SamplingParams, pack_ids, unpack_ids
from rayllm.runner.runner import Runner

BROKEN = 270
SOUND = [[5, 6, 7], [8] * 20, [9] * 3, [30, 31, 32, 33, 34]]


@pytest.fixture
def engine(llama_path: Path) -> LocalEngine:
    settings = {"device": "cpu", "block_size": 4, "num_kv_blocks": 40, "max_model_len": 64, "max_num_seqs": 8}
    config = resolve(EngineConfig(model=str(llama_path), max_num_batched_tokens=16, **settings))
    runner = Runner(config, TensorParallel())
    runner._model.decoder._embedding.weight_VD[BROKEN] = torch.nan  # a folder with a NaN is refused
    return LocalEngine(config, InprocExecutor(runner))


def _request(prompt: list[int], **params: object) -> Request:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})  # type: ignore[arg-type]
    return Request(
        request_id="r", prompt=pack_ids(prompt), params=sampling, seed=3, max_tokens=sampling.max_tokens or 1
    )


def _run(engine: LocalEngine, requests: list[Request], first: int) -> list[tuple[list[int], Finish | None]]:
    """Tokens and end of each request, all at once; each has a stream of its own."""
    answers: list[tuple[list[int], Finish | None]] = [([], None) for _ in requests]
    for i, request in enumerate(requests):
        engine.submit(first + i, request)
    while any(finish is None for _, finish in answers):
        for delta in engine.receive():
            tokens, finish = answers[delta.stream - first]
            assert finish is None
            answers[delta.stream - first] = [*tokens, *unpack_ids(delta.token_ids)], delta.finish
    return answers


def test_a_request_without_valid_logits_ends_alone_and_leaves_nothing_behind(engine: LocalEngine) -> None:
    sound = [_request(prompt) for prompt in SOUND] + [_request(SOUND[0], temperature=1.0)]
    expected = [_run(engine, [request], i)[0] for i, request in enumerate(sound)]
    broken = [
        _request([BROKEN, *range(40, 70)]),
        _request([8, 8, BROKEN], temperature=0.9, logprobs=2),
        _request([9, BROKEN, 9, 9], prompt_logprobs=1),
    ]
    for first in range(100, 400, 100):  # again and again: blocks come back to others
        answers = _run(engine, [broken[0], *sound, *broken[1:], *sound], first)
        bad = [answers[0], *answers[6:8]]
        assert [(tokens, finish and finish.code) for tokens, finish in bad] == [([], "invalid_logits")] * 3
        assert answers[1:6] == expected
        assert answers[8:] == expected
    stats = engine.stats()
    assert (stats.num_faults, stats.num_blocks_used, stats.num_running) == (0, 0, 0)


def test_a_choice_without_valid_logits_ends_its_request(engine: LocalEngine) -> None:
    engine.submit(0, _request([5, BROKEN], n=3, temperature=1.0))
    ends = {delta.stream: delta.finish for _ in range(2) for delta in engine.receive()}
    assert {stream: finish and finish.code for stream, finish in ends.items()} == dict.fromkeys(
        range(3), "invalid_logits"
    )
