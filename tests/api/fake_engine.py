"""An engine without a model: it says a prepared text, or echoes the prompt's ids, one delta a step."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from fakes import fake_spec

from rayllm.config import EngineConfig, ModelShape, ResolvedConfig
from rayllm.errors import EngineError
from rayllm.messages import EngineStats, Finish, Times, TokenDelta, TokenLogprobs
from rayllm.request import Request, pack_ids

EOS_ID = 2
VOCAB_SIZE = 288
MAX_MODEL_LEN = 128


def config(**changes: object) -> ResolvedConfig:
    values: dict[str, object] = {
        "engine": EngineConfig(),
        "model_path": "/nowhere",
        "tokenizer_path": "/nowhere",
        "served_model_name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "backend": "inproc",
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "shape": ModelShape(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,), num_layers=2),
        "spec": fake_spec(VOCAB_SIZE, num_layers=2),
        "num_threads": 1,
    }
    return ResolvedConfig(**{**values, **changes})  # type: ignore[arg-type]


def logprobs_of(token_id: int, k: int) -> TokenLogprobs:
    """The token at -0.5 and rank 2, then the k next ids at -0.25, -1.25, ..."""
    others = [(token_id + i) % VOCAB_SIZE for i in range(1, k + 1)]
    values = array("f", [-0.5, *(-0.25 - i for i in range(k))])
    return TokenLogprobs(ids=pack_ids([token_id, *others]), values=values.tobytes(), rank=2)


@dataclass
class FakeStream:
    engine: FakeEngine
    request: Request
    aborted: set[int] = field(default_factory=set)
    closed: bool = False
    num_steps: int = 0

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self._deltas()

    def abort_choice(self, choice: int) -> None:
        self.aborted.add(choice)

    def close(self) -> None:
        self.closed = True

    async def _deltas(self) -> AsyncIterator[list[TokenDelta]]:
        engine, request = self.engine, self.request
        outputs = [engine.output(request, choice) for choice in range(request.params.n)]
        position = 0
        finished: set[int] = set()
        while len(finished | self.aborted) < len(outputs):
            await engine.pause(self.num_steps)
            if engine.fault_at == self.num_steps:
                raise EngineError("the driver is gone", code="driver_died")
            self.num_steps += 1
            deltas = []
            for choice, ids in enumerate(outputs):
                if choice in finished or choice in self.aborted:
                    continue
                delta = self._delta(choice, ids, position)
                deltas.append(delta)
                if delta.finish is not None:
                    finished.add(choice)
            position += engine.tokens_a_step
            yield deltas

    def _delta(self, choice: int, ids: Sequence[int], position: int) -> TokenDelta:
        engine, request = self.engine, self.request
        if engine.error is not None:
            return TokenDelta(choice, choice, b"", engine.error)
        new = list(ids[position : position + engine.tokens_a_step])
        ended = position + len(new) >= len(ids)
        finish = None
        if ended:
            stops = {EOS_ID, *request.params.stop_token_ids} if not request.params.ignore_eos else set()
            stopped = bool(new) and new[-1] in stops
            finish = Finish("stop", None if new[-1] == EOS_ID else new[-1]) if stopped else Finish("length")
        k = request.params.logprobs
        prompt_k = request.params.prompt_logprobs
        first = position == 0
        return TokenDelta(
            choice,
            choice,
            pack_ids(new),
            finish,
            None if k is None else [logprobs_of(token_id, k) for token_id in new],
            [logprobs_of(token_id, prompt_k) for token_id in list(request.prompt_token_ids)[1:]]
            if prompt_k is not None and first and choice == 0
            else None,
            engine.num_cached_tokens if first else 0,
            Times(queued_s=0.25, prefill_s=0.5) if first else None,
        )


class FakeEngine:
    """`say(request, choice)` gives the ids of an answer; it is cut at `max_tokens` and after a stop token."""

    def __init__(self, say: Callable[[Request, int], Sequence[int]]):
        self.say = say
        self.tokens_a_step = 1
        self.num_cached_tokens = 0
        self.error: Finish | None = None
        self.refusal: Exception | None = None
        self.fault_at: int | None = None
        self.healthy = True
        self.stats_error: Exception | None = None
        self.stalled = asyncio.Event()
        self.stall_at: int | None = None
        self.go_on = asyncio.Event()
        self.streams: list[FakeStream] = []

    def submit(self, request: Request) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> None:
        """It keeps nothing."""

    def forget(self, client_key: str, answer_id: str) -> None:
        pass

    async def stats(self) -> EngineStats:
        if self.stats_error is not None:
            raise self.stats_error
        values = dict.fromkeys(EngineStats.__struct_fields__[: -len(EngineStats.__struct_defaults__)], 0)
        reason = "" if self.healthy else "a worker is being replaced"
        return EngineStats(**{**values, "healthy": self.healthy, "reason": reason, "num_steps": 3})

    async def pause(self, num_steps: int) -> None:
        if self.stall_at is not None and num_steps >= self.stall_at:
            self.stalled.set()
            await self.go_on.wait()
        await asyncio.sleep(0)

    def output(self, request: Request, choice: int) -> list[int]:
        ids = list(self.say(request, choice))[: request.max_tokens]
        stops = set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else {EOS_ID})
        for i, token_id in enumerate(ids):
            if token_id in stops:
                return ids[: i + 1]
        return ids

    @property
    def requests(self) -> list[Request]:
        return [stream.request for stream in self.streams]
