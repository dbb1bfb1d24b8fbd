"""One rank alone, driven by plans written by hand, against `transformers`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from triton_interpreter import corrected

from rayllm.config import EngineConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.resolve import resolve
from rayllm.messages import RowParams, RowStart, RowTable, StepPlan, StepResult
from rayllm.request import StructuredOutputsParams, pack_ids, unpack_ids
from rayllm.runner.runner import Runner
from rayllm_kernels.device import interpreted

PROMPT = [5, 9, 30, 31, 77, 100, 12]


@pytest.fixture
def runner(llama_path: Path) -> Runner:
    config = resolve(EngineConfig(model=str(llama_path), device="cpu", block_size=4, max_num_seqs=4, num_kv_blocks=200))
    runner = Runner(config, TensorParallel())
    runner.start(runner.num_blocks_available())
    runner.warm_up()
    return runner


@pytest.fixture(scope="module")
def reference(llama_path: Path) -> list[torch.Tensor]:
    """Per emitted token: `transformers`' log-probabilities after the prompt and the greedy tokens before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    tokens, found = list(PROMPT), []
    for _ in range(6):
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        found.append(logprobs)
        tokens.append(int(logprobs.argmax()))
    return found


def _start(row: int, blocks: list[int], **params: object) -> RowStart:
    sampling = RowParams(temperature=0, **params)  # type: ignore[arg-type]
    return RowStart(row, pack_ids(PROMPT), len(PROMPT), 0, [RowTable(pack_ids(blocks))], sampling, 0, 0)


def _plan(
    step: int, counts: dict[int, int], new: list[RowStart] | None = None, finished: tuple[int, ...] = ()
) -> StepPlan:
    rows, lengths = pack_ids(counts), pack_ids(counts.values())
    return StepPlan(step, 3, pack_ids(finished), new or [], b"", b"", rows, lengths, sum(counts.values()))


def _tokens(result: StepResult) -> dict[int, int]:
    return dict(zip(unpack_ids(result.rows), unpack_ids(result.token_ids), strict=True))


def test_tokens_and_logprobs_are_those_of_transformers(runner: Runner, reference: list[torch.Tensor]) -> None:
    for step, expected in enumerate(reference):
        plan = (
            _plan(step, {1: len(PROMPT)}, [_start(1, [8, 2, 5, 1], logprobs=2)]) if step == 0 else _plan(step, {1: 1})
        )
        result = runner.execute(plan)
        assert (result.step, result.epoch) == (step, 3)
        assert _tokens(result) == {1: int(expected.argmax())}
        [logprobs] = result.logprobs[1]
        values, ids = np.frombuffer(logprobs.values, np.float32), list(unpack_ids(logprobs.ids))
        assert ids == [int(expected.argmax()), *expected.topk(2).indices.tolist()]
        assert values == pytest.approx(expected[ids].numpy(), abs=1e-4)


@pytest.mark.parametrize("asked", [{"task": "embed"}, {"adapter": "french"}])
def test_a_task_or_adapter_that_cannot_be_computed_is_refused(runner: Runner, asked: dict[str, str]) -> None:
    start = msgspec.structs.replace(_start(1, [8, 2, 5, 1]), **asked)
    with pytest.raises(ValueError, match=next(iter(asked.values()))):
        runner.execute(_plan(0, {1: len(PROMPT)}, [start]))


def test_a_chunk_that_does_not_reach_the_end_samples_nothing(runner: Runner, reference: list[torch.Tensor]) -> None:
    first = runner.execute(_plan(0, {0: 4}, [_start(0, [3, 4, 6])]))
    assert _tokens(first) == {}
    second = runner.execute(_plan(1, {0: 3}))
    assert _tokens(second) == {0: int(reference[0].argmax())}


def test_prompt_logprobs_are_those_of_transformers_over_chunks(runner: Runner, llama_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    results = [
        runner.execute(_plan(0, {0: 3}, [_start(0, [3, 4], prompt_logprobs=1)])),
        runner.execute(_plan(1, {0: 4})),
    ]
    found = [entry for result in results for entry in result.prompt_logprobs[0]]
    assert len(found) == len(PROMPT) - 1
    for position, entry in enumerate(found):
        token = PROMPT[position + 1]
        assert list(unpack_ids(entry.ids)) == [token, int(expected[position].argmax())]
        assert np.frombuffer(entry.values, np.float32)[0] == pytest.approx(float(expected[position, token]), abs=1e-4)
        assert entry.rank == 1 + int((expected[position] > expected[position, token]).sum())


def test_a_row_taken_over_by_another_sequence_starts_afresh(runner: Runner, reference: list[torch.Tensor]) -> None:
    runner.execute(_plan(0, {0: len(PROMPT)}, [_start(0, [3, 4], repetition_penalty=50.0)]))
    result = runner.execute(_plan(1, {0: len(PROMPT)}, [_start(0, [3, 4])], finished=(0,)))
    assert _tokens(result) == {0: int(reference[0].argmax())}


def test_a_rows_nan_harms_no_row_beside_it_and_none_that_gets_its_blocks(
    runner: Runner, reference: list[torch.Tensor]
) -> None:
    runner._model.decoder._embedding.weight_VD[200] = torch.nan
    broken = RowStart(0, pack_ids([200] * 9), 9, 0, [RowTable(pack_ids([0, 1, 2]))], RowParams(temperature=0), 0, 0)
    first = runner.execute(_plan(0, {0: 9, 1: 7}, [broken, _start(1, [8, 3])]))
    second = runner.execute(_plan(1, {0: 1, 1: 1}))  # the shorter row reads a page beyond its own
    third = runner.execute(_plan(2, {2: 7}, [_start(2, [2, 1])], finished=(0, 1)))
    for result, row, place in ((first, 1, 0), (second, 1, 1), (third, 2, 0)):
        assert _tokens(result)[row] == int(reference[place].argmax())
    assert [list(unpack_ids(result.invalid_rows)) for result in (first, second, third)] == [[0], [0], []]


def test_what_the_kv_pool_held_before_a_start_harms_nobody(runner: Runner, reference: list[torch.Tensor]) -> None:
    for cache in (cache for layer in runner._pool().layers for cache in layer):
        cache.fill_(torch.nan)
    runner.start(200)
    plans = [_plan(0, {0: 7, 1: 7}, [_start(0, [0, 1, 2]), _start(1, [8, 3, 5])]), *[_plan(1, {0: 1, 1: 1})] * 3]
    for plan, expected in zip(plans, reference, strict=False):
        result = runner.execute(plan)
        assert list(_tokens(result).values()) == [int(expected.argmax())] * 2
        assert not result.invalid_rows


def test_a_step_may_be_launched_before_the_one_before_it_is_finished(
    runner: Runner, reference: list[torch.Tensor]
) -> None:
    first = runner.launch(_plan(0, {1: len(PROMPT)}, [_start(1, [8, 2, 5, 1], logprobs=2)]))
    in_flight = [first, runner.launch(_plan(1, {1: 1})), runner.launch(_plan(2, {1: 1}))]
    results = [runner.finish(step) for step in in_flight]
    assert [result.step for result in results] == [0, 1, 2]
    assert [_tokens(result)[1] for result in results] == [int(expected.argmax()) for expected in reference[:3]]


def test_a_plan_is_launched_ahead_unless_a_grammar_binds_one_of_its_rows(runner: Runner) -> None:
    bound = _start(0, [3, 4], structured_outputs=StructuredOutputsParams(regex="[a-z]{9}"))
    assert runner.max_launched_steps == 1  # it computes on a CPU
    assert not runner.may_launch_ahead(_plan(0, {0: len(PROMPT)}, [bound]))
    runner.execute(_plan(0, {0: len(PROMPT), 1: len(PROMPT)}, [bound, _start(1, [8, 2])]))
    assert not runner.may_launch_ahead(_plan(1, {0: 1, 1: 1}))
    assert runner.may_launch_ahead(_plan(1, {1: 1}))


@pytest.mark.parametrize("on_device", [False, pytest.param(True, marks=pytest.mark.kernels)])
def test_the_largest_step_is_computed_before_the_start_and_leaves_nothing_behind(
    llama_path: Path, reference: list[torch.Tensor], on_device: bool
) -> None:
    settings = {"block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 40, "max_model_len": 64}
    with corrected() if on_device else nullcontext(), interpreted() if on_device else nullcontext():
        config = resolve(EngineConfig(model=str(llama_path), device="cpu", num_kv_blocks=200, **settings))
        runner = Runner(config, TensorParallel())
        runner.compute_largest_step()
        assert runner._kv is None
        runner.start(200)
        result = runner.execute(_plan(0, {1: len(PROMPT)}, [_start(1, [8, 2, 5, 1])]))
    assert _tokens(result) == {1: int(reference[0].argmax())}
    assert not result.invalid_rows
