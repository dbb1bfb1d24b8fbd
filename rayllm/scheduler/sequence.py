"""One token stream of a request, and where it stands: tokens, blocks, row."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from rayllm.messages import Finish, TokenLogprobs
from rayllm.request import Request, unpack_ids


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class BlockTable:
    """A sequence's blocks in one KV group, in the order of its tokens."""

    blocks: list[int] = field(default_factory=list)
    end: int = 0
    """The number in the sequence of the block after the last of `blocks`."""

    @property
    def first(self) -> int:
        """The number in the sequence of the first of `blocks`: those before it were let go of."""
        return self.end - len(self.blocks)


class Sequence:
    """Choice `choice` of `request`. The scheduler alone changes it.

    Workers know `num_tokens` tokens of it: the committed `tokens` and `num_pending` more that they sampled
    and the driver has not seen. `num_computed` of them have KV, or will once the plans already made have run.
    """

    __slots__ = (
        "answered",
        "awaited",
        "block_hashes",
        "charged",
        "choice",
        "client",
        "end_id",
        "finish",
        "goes_first",
        "is_beyond",
        "max_length",
        "num_blocks_missing",
        "num_cached_tokens",
        "num_computed",
        "num_pending",
        "num_prompt_tokens",
        "num_published",
        "num_slots",
        "order",
        "priority",
        "prompt_hashes",
        "prompt_logprobs",
        "request",
        "resume_after",
        "row",
        "status",
        "stop_ids",
        "tables",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        choice: int,
        *,
        arrival: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        prompt_hashes: list[bytes],
    ):
        params = request.params
        self.request = request
        self.choice = choice
        self.client = request.client_key
        self.priority = request.priority
        self.order = (request.priority, arrival)
        """Who of a client, and who of the running ones, is served first; no two sequences have the same."""
        self.tokens: array[int] = unpack_ids(request.prompt)
        """Prompt, then emitted: what the driver knows for certain."""
        self.num_prompt_tokens = len(self.tokens)
        if choice < len(request.emitted):
            self.tokens.frombytes(request.emitted[choice])
        self.max_length = min(self.num_prompt_tokens + request.max_tokens, max_model_len)
        end_ids = () if params.ignore_eos else eos_token_ids
        self.end_id = next(iter(end_ids), None)
        """The end token that is no news; all others that end it are told as the reason."""
        self.stop_ids = frozenset(end_ids).union(params.stop_token_ids)

        self.status = Status.WAITING
        self.finish: Finish | None = None
        self.row: int | None = None
        self.tables: list[BlockTable] = []  # one for each KV group
        self.num_slots = 0  # tokens that have a block in each table, or had one before their window passed
        self.num_computed = 0
        self.num_pending = 0
        self.charged = False
        """Whether its prompt was counted as service to its client: once, however often it is computed."""
        self.resume_after = 0
        """The last plan that may hold it, when it was preempted: it waits until that one is committed."""
        self.num_blocks_missing = 0
        """New blocks that it asked for when it last tried to run."""

        self.prompt_hashes = prompt_hashes
        """Hashes of the prompt's full blocks, one list for all choices; filled when first needed."""
        self.block_hashes: list[bytes] | None = None
        """Hashes of its own full blocks, `prompt_hashes` first."""
        self.goes_first = False
        """While it waits, before all of its priority: what it runs is interrupted, not begun."""
        self.is_beyond = False
        """Whether its KV is computed as that of a sequence longer than the model's rope boundary."""
        self.num_published = 0
        """Leading blocks that the prefix cache knows."""
        self.awaited: bytes | None = None
        """The block it is deferred for, while another sequence computes it."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens that the prefix cache served when it first ran."""

        self.answered = len(self.tokens) > self.num_prompt_tokens
        """Whether a token of it was delivered, by this scheduler or before a replay."""
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if self._wants_prompt_logprobs() else None

    def _wants_prompt_logprobs(self) -> bool:
        return self.request.params.prompt_logprobs is not None and self.choice == 0 and not self.answered

    @property
    def num_tokens(self) -> int:
        """Tokens that the workers know."""
        return len(self.tokens) + self.num_pending

    @property
    def num_emitted(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def finish_reason(self) -> Finish | None:
        """Why it ends with its last token, if it does: a stop token (from `min_tokens` on), or its length."""
        if 0 < self.num_emitted >= self.request.params.min_tokens:
            last = self.tokens[-1]
            if last in self.stop_ids:
                return Finish("stop", None if last == self.end_id else last)
        return Finish("length") if len(self.tokens) >= self.max_length else None

    def append(
        self, token_ids: list[int], logprobs: list[TokenLogprobs] | None, reported: Finish | None
    ) -> SequenceUpdate:
        """Takes the tokens of one step, up to the one that ends it; the update says which, and why it ends if it does.
        `reported` is an end that the worker knows of at the last one."""
        update = SequenceUpdate(self, token_ids, logprobs=logprobs)
        if not self.answered:
            update.add_first_token_fields()
        self.num_pending -= 1
        for number, token_id in enumerate(token_ids, 1):
            self.tokens.append(token_id)
            if reported is not None or token_id in self.stop_ids or len(self.tokens) >= self.max_length:
                update.finish = self.finish_reason()
                is_reported = reported is not None and number == len(token_ids)
                if is_reported and (update.finish is None or update.finish.reason == "length"):
                    update.finish = reported
                if update.finish:
                    del token_ids[number:]
                    if logprobs is not None:
                        del logprobs[number:]
                    break
        return update

    def has_crossed(self, rope_boundary: int) -> bool:
        """Whether its next token cannot be computed with the KV that it has: it has grown past the boundary."""
        return not self.is_beyond and rope_boundary < self.num_tokens < self.max_length

    def choose_rope(self, rope_boundary: int) -> None:
        """Says, before it is computed from its first token on, which KV its length asks for. Blocks of the other kind
        have other hashes."""
        if not self.is_beyond and len(self.tokens) > rope_boundary:
            self.is_beyond = True
            self.prompt_hashes, self.block_hashes = [], None

    def release(self) -> None:
        """Drops its row and KV: it waits, and will be computed again from its tokens."""
        self.status = Status.WAITING
        self.row = None
        self.tables = []
        self.num_slots = self.num_computed = self.num_published = 0

    def check(self, num_steps_in_flight: int) -> None:
        """`AssertionError` if an invariant of a queued sequence is broken. Slow: for tests."""
        assert self.finish is None, f"{self} has finished and is queued"
        assert 0 <= self.num_pending <= num_steps_in_flight, f"{self} has too many pending tokens"
        assert self.num_tokens <= self.max_length, f"{self} is planned past its length"
        assert self.num_computed <= self.num_tokens, f"{self} has KV for unknown tokens"
        if self.status is Status.WAITING:
            assert self.row is None, f"{self} waits and has a row"
            assert not self.tables, f"{self} waits and has blocks"

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, choice={self.choice}, {self.status.value}, "
            f"row={self.row}, tokens={len(self.tokens)}+{self.num_pending}, computed={self.num_computed})"
        )


@dataclass(slots=True)
class SequenceUpdate:
    """What a step's result added to a sequence."""

    sequence: Sequence
    token_ids: list[int]
    finish: Finish | None = None
    logprobs: list[TokenLogprobs] | None = None
    """Parallel with `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt positions 1.., once, with the first token of choice 0."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache served; said with the first token."""

    def add_first_token_fields(self) -> None:
        """Adds what is said with the sequence's first token alone."""
        self.sequence.answered = True
        self.num_cached_tokens = self.sequence.num_cached_tokens or 0
        self.prompt_logprobs, self.sequence.prompt_logprobs = self.sequence.prompt_logprobs, None
