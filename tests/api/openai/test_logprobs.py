"""Log-probabilities of many positions are the same JSON as those of few, written a position at a time."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from api.fake_engine import VOCAB_SIZE, logprobs_of
from serve.served import tokenizer

from rayllm.api.openai.logprobs import _NUM_OBJECTS, chat_logprobs, completion_logprobs, prompt_logprobs

_IDS = [number % VOCAB_SIZE for number in range(_NUM_OBJECTS + 300)]
_ENTRIES = [logprobs_of(token_id, 3) for token_id in _IDS]


def _shown(number: int, shape: str) -> list[Any]:
    """An entry for each of the last `number` positions."""
    ids, entries = _IDS[-number:], _ENTRIES[-number:]
    if shape == "chat":
        found = chat_logprobs(tokenizer(), entries)["content"]
    elif shape == "completion":
        found = completion_logprobs(tokenizer(), ids, [None, *entries[1:]], range(number))["top_logprobs"]
    else:
        found = (prompt_logprobs(tokenizer(), entries) or [])[1:]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("shape", ["chat", "completion", "prompt"])
def test_many_positions_are_json_text_that_says_what_objects_say(shape: str) -> None:
    many, few = _shown(len(_IDS), shape), _shown(200, shape)

    assert any(isinstance(entry, dict) for entry in few)
    assert not any(isinstance(entry, dict) for entry in many)  # they would be collected, freed and written at once
    assert len(many) == len(_IDS)
    written, expected = orjson.loads(orjson.dumps(many)), orjson.loads(orjson.dumps(few))
    assert written[-199:] == expected[1:]
