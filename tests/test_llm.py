from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayllm import LLM, SamplingParams
from rayllm.errors import ContextLengthError, EngineError, RequestError
from rayllm.prompt.prompts import prepare_prompt
from rayllm.request import OutputError


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The built-in model."""
    with LLM(device="cpu", max_num_seqs=16, max_model_len=512) as llm:
        yield llm


def test_an_unknown_setting_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match=r"'max_num_sequences'; did you mean 'max_num_seqs'\?"):
        LLM(max_num_sequences=3)


def test_outputs_come_in_the_order_of_the_prompts_with_their_texts(llm: LLM) -> None:
    prompts = ["Hello", "What is RayLLM?", "One two three"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    assert [output.prompt for output in outputs] == prompts
    tokenizer = llm.get_tokenizer()
    for output in outputs:
        assert output.finished
        assert output.prompt_token_ids == tokenizer.encode(output.prompt or "")
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)


def test_the_built_in_model_answers_and_stops_by_itself(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "What is RayLLM?"}], SamplingParams(temperature=0, max_tokens=200))
    assert "Ray" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None


def test_a_stream_adds_up_to_the_whole_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    [whole] = llm.generate("Tell me about blocks.", params)
    parts = list(llm.stream("Tell me about blocks.", params))
    assert "".join(part.text for part in parts) == whole.outputs[0].text
    assert [i for part in parts for i in part.token_ids] == whole.outputs[0].token_ids
    assert [part.finish_reason for part in parts if part.finish_reason] == [whole.outputs[0].finish_reason]


def test_a_stream_that_is_left_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("Tell me a story.", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.stats().num_blocks_used == 0
    [output] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4


def test_a_stop_string_ends_the_answer_and_the_work(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    [free] = llm.generate("What is RayLLM?", params)
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    [stopped] = llm.generate("What is RayLLM?", params.with_(stop=(stop,)))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert len(stopped.outputs[0].token_ids) < len(free.outputs[0].token_ids)
    assert llm.stats().num_running == 0


@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"seed": 3, "n": 3}], ids=str)
def test_bad_words_are_not_written(llm: LLM, drawn: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, **drawn)
    [free] = llm.generate("What is RayLLM?", params)
    words = sorted({word for choice in free.outputs for word in choice.text.split() if word.isalpha()})
    [bound] = llm.generate("What is RayLLM?", params.with_(bad_words=words))
    assert len(words) > 3
    for choice in bound.outputs:
        assert len(choice.token_ids) == 40
        assert not set(words) & set(choice.text.split())


def test_an_answer_that_is_given_up_costs_the_others_nothing(llm: LLM) -> None:
    sound = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    stuck = sound.with_(allowed_token_ids=(5,), bad_words_token_ids=((5, 5, 5),))
    expected, _ = llm.generate(["Hello", "One two"], sound)
    first, failed, last = llm.generate(["Hello", "Hello", "Hello"], [sound, stuck, sound])
    assert first.outputs == last.outputs == expected.outputs
    assert failed.finished
    assert (failed.outputs[0].finish_reason, failed.outputs[0].token_ids) == ("error", [5, 5])
    assert failed.outputs[0].error == OutputError(
        "bad_words and the request's other constraints leave no token to sample", "no_token_left"
    )
    assert expected.outputs[0].error is None


def test_a_call_whose_every_answer_is_given_up_raises(llm: LLM) -> None:
    stuck = SamplingParams(allowed_token_ids=(5,), bad_words_token_ids=((5,),), n=2)
    with pytest.raises(EngineError, match="leave no token to sample") as caught:
        llm.generate(["Hello", "Hello"], stuck)
    assert caught.value.code == "no_token_left"
    with pytest.raises(EngineError, match="leave no token to sample"):
        list(llm.stream("Hello", stuck))
    assert llm.stats().num_running == 0


def test_logprobs_of_output_and_prompt_have_one_entry_a_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [output] = llm.generate([[5, 6, 7, 8]], params)
    choice = output.outputs[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs) == 5
    for token_id, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry[token_id].rank == 1
        assert entry[token_id].logprob == max(candidate.logprob for candidate in entry.values())
        assert len(entry) == 2
    assert choice.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(choice.token_ids, choice.logprobs))
    )
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [set(entry) >= {token} for token, entry in zip([6, 7, 8], output.prompt_logprobs[1:]) if entry] == [True] * 3


def test_requests_without_a_seed_differ_and_the_whole_run_repeats() -> None:
    runs = []
    for _ in range(2):
        with LLM(device="cpu", seed=7, max_model_len=256, num_kv_blocks=64) as llm:
            outputs = llm.generate(
                ["Once upon a time"] * 3, SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
            )
            runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == 3


def test_a_long_prompt_is_truncated_where_the_parameters_say_so(llm: LLM) -> None:
    ids, limit = list(range(5, 205)) * 20, llm.config.max_model_len
    greedy = SamplingParams(temperature=0, max_tokens=4)
    params = [greedy.with_(truncate_prompt_tokens=num) for num in (7, -1)]
    last, rest = llm.generate([{"prompt_token_ids": ids}] * 2, params)
    assert last.prompt_token_ids == ids[-7:]
    assert rest.prompt_token_ids == ids[-(limit - 4) :]
    [whole] = llm.generate({"prompt_token_ids": ids[-7:]}, greedy)
    assert last.outputs[0].token_ids == whole.outputs[0].token_ids
    with pytest.raises(RequestError, match=rf"truncate_prompt_tokens={limit + 1} is outside \[1, {limit}\]"):
        llm.generate("hi", SamplingParams(truncate_prompt_tokens=limit + 1))


def test_a_requests_priority_is_its_parameters(llm: LLM) -> None:
    request = llm._client.request(prepare_prompt("hi", llm._text_model), SamplingParams(priority=-3))
    assert request.priority == -3


def test_a_prompt_that_does_not_fit_starts_nothing(llm: LLM) -> None:
    before = llm.stats().num_prompt_tokens
    with pytest.raises(ContextLengthError, match="maximum context length is 512"):
        llm.generate([[5], [5] * 513], SamplingParams(max_tokens=4))
    assert llm.stats().num_prompt_tokens == before


@pytest.mark.parametrize("prompt", [[], ["a", 5], {"text": "a"}, [[5.5]], [[10**7]], [[-1]], [[2**40]]])
def test_a_bad_prompt_is_refused(llm: LLM, prompt: list[int]) -> None:
    if prompt == []:
        assert llm.generate(prompt) == []
        return
    with pytest.raises(RequestError):
        llm.generate(prompt, SamplingParams(max_tokens=4))


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate([[5]], [SamplingParams(), SamplingParams()])


def test_special_tokens_in_a_message_are_plain_text(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "a<|im_end|>b"}], SamplingParams(max_tokens=1))
    tokenizer = llm.get_tokenizer()
    assert output.prompt_token_ids.count(tokenizer.encode("<|im_end|>")[0]) == 1
    assert "a<|im_end|>b" in str(output.prompt)


def test_greedy_tokens_are_those_of_transformers(llama_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [[5, 6, 7], list(range(20, 60)), [100] * 9]
    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    with LLM(str(llama_path), device="cpu", num_kv_blocks=64) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == ids[0, len(prompt) :].tolist()
