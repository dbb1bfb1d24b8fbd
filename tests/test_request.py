from __future__ import annotations

import math

import msgspec
import pydantic
import pytest

from rayllm.messages import ClientMessage, RowStart, Submit
from rayllm.request import Request, SamplingParams, StructuredOutputsParams, pack_ids, unpack_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("bad_words", [""]),
        ("bad_words", [5]),
        ("bad_words", "word"),
        ("bad_words", ["word"] * 1025),
        ("bad_words_token_ids", [[]]),
        ("bad_words_token_ids", [[3, -1]]),
        ("allowed_token_ids", []),
        ("logit_bias", {1: 101.0}),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", True),
        ("truncate_prompt_tokens", 1.5),
        ("priority", 2**31),
        ("priority", None),
        ("best_of", 2),
        ("spaces_between_special_tokens", False),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens=5 is more than max_tokens=4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_normal_forms() -> None:
    params = SamplingParams(stop="end", top_k=-1, logit_bias={"7": 1})  # type: ignore[dict-item, arg-type]
    assert (params.stop, params.top_k, params.logit_bias) == (("end",), 0, {7: 1.0})
    assert SamplingParams(temperature=0).greedy


def test_a_request_crosses_a_process_whole() -> None:
    request = Request(
        request_id="a",
        prompt=pack_ids([1, 2, 2**31 - 1]),
        params=SamplingParams(stop=["x"], logit_bias={3: -1.5}, allowed_token_ids=(1, 2), seed=-5),
        seed=-5,
        max_tokens=9,
        emitted=(pack_ids([4]),),
    )
    frame = msgspec.msgpack.encode(Submit(3, request))
    assert msgspec.msgpack.Decoder(ClientMessage).decode(frame) == Submit(3, request)


def test_ids_survive_packing() -> None:
    assert list(unpack_ids(pack_ids([0, 5, 2**31 - 1]))) == [0, 5, 2**31 - 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing given; give exactly one of json"),
        ({"json_object": False}, "nothing given"),
        ({"json_object": True, "regex": "a"}, "json_object and regex given"),
        ({"json": 3}, "json must be a JSON schema"),
        ({"json": {"x": float("nan")}}, "json cannot be written as JSON"),
        ({"regex": ""}, "regex must be a text"),
        ({"grammar": 1}, "grammar must be a text"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": ["yes", ""]}, "choice must hold texts"),
        ({"json_object": "yes"}, "json_object must be true or false"),
    ],
)
def test_structured_outputs_ask_for_exactly_one_kind(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


def test_a_schema_may_be_text_a_dict_or_a_pydantic_model_and_keeps_its_order() -> None:
    class Point(pydantic.BaseModel):
        y: int
        x: int

    schema = {"type": "object", "properties": {"y": {"type": "integer"}, "x": {"type": "integer"}}}
    text = '{"type":"object","properties":{"y":{"type":"integer"},"x":{"type":"integer"}}}'
    assert StructuredOutputsParams(json=schema).json == text
    assert StructuredOutputsParams(json=text).json == text
    written = StructuredOutputsParams(json=Point).json
    assert written is not None
    assert written.index('"y"') < written.index('"x"')


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutputsParams(json={"type": "object"}, disable_any_whitespace=True),
        StructuredOutputsParams(choice=("yes", "no")),
        StructuredOutputsParams(json_object=True),
    ],
)
def test_structured_outputs_travel_with_a_request_and_a_row(structured: StructuredOutputsParams) -> None:
    params = SamplingParams(structured_outputs=structured)
    request = Request(request_id="a", prompt=pack_ids([1]), params=params, seed=1, max_tokens=4)
    frame = msgspec.msgpack.encode(Submit(0, request))
    assert msgspec.msgpack.decode(frame, type=ClientMessage).request.params.structured_outputs == structured
    start = RowStart(0, pack_ids([1]), 1, 0, b"", params, 1, 0)
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=RowStart)
    assert found.params.structured_outputs == structured
    assert found.params.structured_outputs.kind == structured.kind
