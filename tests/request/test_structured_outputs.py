from __future__ import annotations

import msgspec
import pydantic
import pytest

from rayllm.messages import ClientMessage, RowParams, RowStart, Submit
from rayllm.request import Request, SamplingParams, StructuredOutputsParams, pack_ids


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
    start = RowStart(0, pack_ids([1]), 1, 0, [], RowParams.of(params), 1, 0)
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=RowStart)
    assert found.params.structured_outputs == structured
    assert found.params.structured_outputs.kind == structured.kind
