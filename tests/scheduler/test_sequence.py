import pytest
from scheduler.simulated_worker import EOS, make_sequence

from rayllm.messages import Finish
from rayllm.scheduler.sequence import Sequence


def answered(emitted: list[int], **params) -> Sequence:
    params = {"ignore_eos": False, "max_tokens": 6} | params
    return make_sequence([1, 2, 3], emitted=[emitted], eos_token_ids=frozenset({EOS}), **params)


@pytest.mark.parametrize(
    ("emitted", "params", "finish"),
    [
        ([], {}, None),
        ([7, 8], {}, None),
        ([7, EOS], {}, Finish("stop", None)),
        ([7, EOS], {"ignore_eos": True}, None),
        ([7, EOS], {"ignore_eos": True, "stop_token_ids": (EOS,)}, Finish("stop", EOS)),
        ([7, EOS], {"stop_token_ids": (EOS,)}, Finish("stop", None)),
        ([7, 9], {"stop_token_ids": (9,)}, Finish("stop", 9)),
        ([9, 7], {"stop_token_ids": (9,)}, None),
        ([7, EOS], {"min_tokens": 3}, None),
        ([7, 7, EOS], {"min_tokens": 3}, Finish("stop", None)),
        ([7] * 6, {}, Finish("length")),
        ([7] * 5 + [EOS], {}, Finish("stop", None)),
        ([7, 7], {"max_model_len": 5}, Finish("length")),
    ],
)
def test_a_sequence_ends_by_stop_tokens_and_lengths(emitted, params, finish):
    assert answered(emitted, **params).finish_reason() == finish


@pytest.mark.parametrize(("last", "reason"), [(EOS, None), (9, 9), (8, 8)])
def test_of_several_end_tokens_the_first_is_no_news(last, reason):
    sequence = make_sequence([1], emitted=[[7, last]], ignore_eos=False, eos_token_ids=(EOS, 9, 8))
    assert sequence.finish_reason() == Finish("stop", reason)


def test_a_stop_token_that_ends_the_prompt_ends_nothing():
    sequence = make_sequence([1, EOS], ignore_eos=False, eos_token_ids=frozenset({EOS}))
    assert sequence.finish_reason() is None


def test_emitted_tokens_are_part_of_it_and_not_of_its_prompt():
    sequence = answered([7, 8])
    assert list(sequence.tokens) == [1, 2, 3, 7, 8]
    assert (sequence.num_prompt_tokens, sequence.num_emitted, sequence.max_length) == (3, 2, 9)
    assert sequence.answered


def test_tokens_after_the_one_that_ends_it_are_not_taken():
    sequence = answered([7])
    sequence.num_pending = 1
    update = sequence.append([8, EOS, 9], None, None)
    assert (update.token_ids, update.finish, sequence.num_emitted, sequence.num_pending) == (
        [8, EOS],
        Finish("stop", None),
        3,
        0,
    )
    assert answered([7]).append([8, 9], None, Finish("stop", is_complete=True)).finish == Finish(
        "stop", is_complete=True
    )


def test_a_sequence_crosses_the_rope_boundary_once_and_only_where_it_goes_on():
    sequence = answered([7])  # of four tokens, and nine at most
    assert not sequence.has_crossed(4)
    sequence.num_pending = 1
    assert sequence.has_crossed(4)
    sequence.choose_rope(4)
    assert not sequence.is_beyond  # its fifth token is not known yet
    sequence.append([8], None, None)
    hashes = sequence.prompt_hashes
    sequence.choose_rope(4)
    assert sequence.is_beyond
    assert sequence.prompt_hashes is not hashes
    assert not sequence.has_crossed(4)
    assert not answered([7] * 6).has_crossed(8)
