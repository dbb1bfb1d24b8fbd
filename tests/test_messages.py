from __future__ import annotations

import msgspec

from rayllm.messages import RowParams, RowStart, RowTable, StepResult
from rayllm.request import SamplingParams, StructuredOutputsParams, pack_ids


def _travelled(message: msgspec.Struct) -> msgspec.Struct:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


def test_each_field_of_row_params_is_one_of_sampling_params_with_the_same_default() -> None:
    params = SamplingParams()
    for field in msgspec.structs.fields(RowParams):
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[operator]
        assert getattr(params, field.name) == default, field.name


def test_text_of_a_request_does_not_travel_to_workers_but_for_its_grammar() -> None:
    params = SamplingParams(
        stop=("STOP-TEXT",), stop_token_ids=(7,), logit_bias={5: -1.5}, seed=9, skip_special_tokens=False,
        structured_outputs=StructuredOutputsParams(regex="GRAMMAR-TEXT+"), bad_words_token_ids=((1, 2),),
    )  # fmt: skip
    start = RowStart(3, pack_ids([1, 2]), 2, 0, [RowTable(pack_ids([4]), 1)], RowParams.of(params), 9, 0)
    frame = msgspec.msgpack.encode(start)
    assert b"STOP-TEXT" not in frame
    assert b"GRAMMAR-TEXT+" in frame
    assert _travelled(start) == start
    assert (start.params.stop_token_ids, start.params.logit_bias) == ((7,), {5: -1.5})
    assert (start.task, start.adapter) == ("generate", None)


def test_row_params_count_log_probabilities_as_sampling_params_do() -> None:
    for params in (SamplingParams(), SamplingParams(logprobs=3), SamplingParams(logprob_token_ids=(4, 5))):
        assert RowParams.of(params).num_logprobs == params.num_logprobs


def test_a_result_without_counts_has_one_token_for_each_row() -> None:
    result = StepResult(1, 0, pack_ids([4, 2]), pack_ids([70, 71]), {}, {}, 0.0)
    assert result.tokens() == [[70], [71]]


def test_rows_of_a_result_have_any_number_of_tokens_and_vectors_beside() -> None:
    result = StepResult(
        1, 0, pack_ids([4, 2, 9]), pack_ids([70, 71, 72, 73]), {}, {}, 0.0,
        counts=pack_ids([1, 3, 0]), vectors={6: b"\0\0\x80?"},
    )  # fmt: skip
    travelled = _travelled(result)
    assert travelled == result
    assert result.tokens() == [[70], [71, 72, 73], []]
