"""Bad words, held against a reference that looks at whole texts."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from drawing import sample

from rayllm.errors import RequestError
from rayllm.messages import RowParams
from rayllm.sampling.sampler import Sampler

V = 6
PROMPT = [1, 2, 3]
Words = tuple[tuple[int, ...], ...]


def make_sampler(max_rows: int = 16) -> Sampler:
    return Sampler(max_rows=max_rows, vocab_size=V, max_model_len=64, eos_token_ids=(), device=torch.device("cpu"))


def logits_of(request: int, position: int) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(1000 * request + position)) * 2


def contains(tokens: list[int], word: tuple[int, ...]) -> bool:
    letters = "".join(map(str, tokens))
    return "".join(map(str, word)) in letters


def reference_stream(params: RowParams, words: Words, *, request: int, num: int) -> list[int]:
    """As if the model itself ruled out whatever would make one of the words appear in the answer."""
    emitted: list[int] = []
    for position in range(num):
        logits_V = logits_of(request, position)
        for token_id in range(V):
            if any(contains([*emitted, token_id], word) for word in words):
                logits_V[token_id] = -torch.inf
        sampler = make_sampler()
        sampler.set_row(0, params, seed=request, choice=0, tokens=PROMPT + emitted, num_prompt_tokens=len(PROMPT))
        emitted.append(int(sample(sampler, logits_V[None], [0]).token_ids_N.array[0]))
    return emitted


def random_words(rng: random.Random) -> Words:
    """Some of one token, some of up to four, with common ends and repeated tokens; never all tokens."""
    words = [tuple(rng.choices(range(V), k=rng.choice([1, 2, 2, 2, 3, 3, 4]))) for _ in range(rng.randint(1, 8))]
    return tuple(word for word in words if len(word) > 1 or word[0] > 2)


PARAMS = [
    RowParams(temperature=0),
    RowParams(),
    RowParams(top_k=3, temperature=2.0),
    RowParams(top_p=0.8),
    RowParams(frequency_penalty=0.5),
    RowParams(logit_bias={2: 3.0}),
]


def test_tokens_are_those_of_a_model_that_cannot_write_the_words() -> None:
    rng = random.Random(1)
    requests = [(random_words(rng), rng.choice(PARAMS)) for _ in range(24)]
    expected = [reference_stream(p, words, request=i, num=12) for i, (words, p) in enumerate(requests)]
    assert any(
        tokens != reference_stream(params, (), request=i, num=12)
        for i, ((_, params), tokens) in enumerate(zip(requests, expected))
    )

    sampler, emitted = make_sampler(len(requests)), [[] for _ in requests]
    for step in range(16):  # rows begin at different steps, are begun again with what they have, and go on
        rows = [i for i in range(len(requests)) if step >= i % 5 and len(emitted[i]) < 12]
        for i in rows:
            words, params = requests[i]
            if not emitted[i] or rng.random() < 0.2:
                bound = msgspec.structs.replace(params, bad_words_token_ids=words)
                sampler.set_row(i, bound, i, 0, PROMPT + emitted[i], len(PROMPT))
        logits_NV = torch.stack([logits_of(i, len(emitted[i])) for i in rows])
        for i, token_id in zip(rows, sample(sampler, logits_NV, rows).token_ids_N.array.tolist()):
            emitted[i].append(token_id)
    assert emitted == expected


def test_the_prompt_is_no_part_of_a_word_and_rows_without_words_are_as_they_were() -> None:
    sampler = make_sampler()
    sampler.set_row(0, RowParams(temperature=0, bad_words_token_ids=((2, 3, 5), (4,))), 0, 0, PROMPT, 3)
    sampler.set_row(1, RowParams(temperature=0), 0, 0, PROMPT, 3)
    logits_V = torch.tensor([0.0, 0, 0, 0, 2, 1])
    assert sample(sampler, logits_V.repeat(2, 1), [1, 0]).token_ids_N.array.tolist() == [4, 5]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    sampler = make_sampler()
    sampler.set_row(0, RowParams(temperature=0, logprobs=1, bad_words_token_ids=((4,),)), 0, 0, PROMPT, 3)
    logits_V = torch.tensor([0.0, 0, 0, 0, 2, 1])
    found = sample(sampler, logits_V[None].clone(), [0]).by_row()[0]
    assert found is not None
    assert torch.frombuffer(bytearray(found.ids), dtype=torch.int32).tolist() == [5, 4]
    assert found.rank == 2


def test_a_row_with_no_token_left_is_stuck_and_one_without_numbers_is_invalid() -> None:
    sampler = make_sampler()
    words = tuple((token_id,) for token_id in range(V))
    sampler.set_row(0, RowParams(bad_words_token_ids=words), 0, 0, PROMPT, 3)
    sampler.set_row(1, RowParams(bad_words_token_ids=((3,),), allowed_token_ids=(3,)), 0, 0, PROMPT, 3)
    sampler.set_row(2, RowParams(bad_words_token_ids=((3,),)), 0, 0, PROMPT, 3)
    sampler.set_row(3, RowParams(bad_words_token_ids=((3,),)), 0, 0, PROMPT, 3)
    logits_NV = torch.zeros(4, V)
    logits_NV[2, 3] = torch.nan
    sampled = sample(sampler, logits_NV, [0, 1, 2, 3])
    assert (sampled.stuck_rows(), sampled.invalid_rows()) == ([0, 1], {2})


def test_ends_may_come_early_where_bad_words_leave_nothing_else() -> None:
    sampler = Sampler(max_rows=1, vocab_size=V, max_model_len=64, eos_token_ids=(0,), device=torch.device("cpu"))
    words = tuple((token_id,) for token_id in range(1, V))
    sampler.set_row(0, RowParams(min_tokens=4, bad_words_token_ids=words), 0, 0, PROMPT, 3)
    assert sample(sampler, torch.zeros(1, V), [0]).token_ids_N.array.tolist() == [0]


def test_an_id_beyond_the_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="bad_words_token_ids holds token id 6, but the model's ids end at 5"):
        make_sampler().set_row(0, RowParams(bad_words_token_ids=((1, 6),)), 0, 0, PROMPT, 3)
