from __future__ import annotations

import msgspec

from rayllm.messages import ClientMessage, Submit
from rayllm.request import Request, SamplingParams, pack_ids


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
