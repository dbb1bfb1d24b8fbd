"""How a generation reads its streams."""

from __future__ import annotations

import asyncio

from api.fake_engine import FakeEngine

from rayllm.api.openai.completions import open_completion
from rayllm.api.service import ModelService


async def test_an_answer_of_several_prompts_that_is_not_read_leaves_its_streams_alone(
    service: ModelService, engine: FakeEngine
) -> None:
    """So that the engine sees that nobody reads, and pauses it."""
    engine.say = lambda request, choice: [10] * 100
    body = {"model": "tiny", "prompt": [[5, 6], [7, 8]], "max_tokens": 100, "stream": True}
    answer = await open_completion(body, service)
    await answer.start()
    for _ in range(300):
        await asyncio.sleep(0)
    assert max(stream.num_steps for stream in engine.streams) <= 4
    pieces = [piece async for piece in answer.stream()]
    answer.close()
    assert sum(piece.count(b'"text"') for piece in pieces) >= 200
