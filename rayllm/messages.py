"""All that crosses a process: frozen msgspec structs, encoded as msgpack arrays, one per frame. Never pickle.

Lists of ids travel as packed int32 (`request.pack_ids`). Two links carry them: driver <-> workers (`StepPlan`,
`StepResult`) and client <-> driver (`ClientMessage`, `DriverMessage`). A client is an ingress, an `AsyncLLM` or
another Ray job.
"""

from __future__ import annotations

from itertools import accumulate

import msgspec

from rayllm.request import Request, SamplingParams, StructuredOutputsParams, unpack_ids

# ---------------------------------------------------------------------------------------------- driver <-> workers


class RowParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The part of `SamplingParams` by which workers draw: ids and numbers, with names and meanings as there. What
    concerns text (stop strings, words, special tokens) stays with the client, with one exception: the text of a grammar
    goes to the workers, who compile it. Values are those that `SamplingParams` has checked.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    structured_outputs: StructuredOutputsParams | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> RowParams:
        return cls(**{name: getattr(params, name) for name in cls.__struct_fields__})

    @property
    def num_logprobs(self) -> int | None:
        """How many log-probabilities a sampled token brings beside its own; None for not even that."""
        return self.logprobs if self.logprob_token_ids is None else len(self.logprob_token_ids)


class RowTable(msgspec.Struct, frozen=True, array_like=True):
    """A row's block table in one KV group (`kv_layout.KVGroup`)."""

    blocks: bytes
    """The KV of the row's tokens from block number `first` on."""
    first: int = 0
    """The tokens before it are seen by none that the row will compute."""


class RowStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a row: all that a worker needs to know of it."""

    row: int
    tokens: bytes
    """Every known token: prompt, then emitted."""
    num_prompt_tokens: int
    """How many of `tokens` are the original prompt: penalties and positions of draws count from there."""
    num_computed_tokens: int
    """Tokens whose KV is already in `tables` (a prefix hit)."""
    tables: list[RowTable]
    """The block table of each KV group so far."""
    params: RowParams
    seed: int
    choice: int
    traceparent: str = ""
    """`Request.traceparent`."""
    task: str = "generate"
    """What is computed of its tokens: `generate` the next one, or a vector of them all (`embed`, `score`, ...)."""
    adapter: str | None = None
    """The adapter (LoRA) that it is computed with; None: the model as it is."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What one step does, as differences from the step before. Applied in the order of its fields.

    A row's sequence has `num_tokens` tokens, of which `num_computed` have KV. `counts[i]` tokens of `rows[i]` are
    computed; where that reaches the row's last token, the worker samples the next one, appends it to the row, and
    may use it as input of the next step before the driver has seen it.
    """

    step: int
    epoch: int
    finished_rows: bytes
    new_rows: list[RowStart]
    grown_rows: bytes
    """Parallel with `grown_blocks`: a block appended to that row's table, in order. Of blocks that a row lets go of
    nothing is said: it does not read them again."""
    grown_blocks: bytes
    rows: bytes
    counts: bytes
    """Parallel with `rows`; each at least 1."""
    num_tokens: int
    """The sum of `counts`."""
    grown_groups: bytes = b""
    """Parallel with `grown_blocks`: the KV group whose table grows; empty where that is the first for all."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one position: the token itself first, then the k most likely in falling order.

    `ids` int32; `values` float32 natural logs; `rank` is the token's own (1 = most likely).
    """

    ids: bytes
    values: bytes
    rank: int


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """The answering rank's result of a plan: what each row of the plan gained, if anything.

    A row gains any number of tokens (one today; with speculation as many as were accepted), or a vector.
    """

    step: int
    epoch: int
    rows: bytes
    """Those that gained tokens, in the order of the plan."""
    token_ids: bytes
    """The tokens of `rows[0]`, then those of `rows[1]`, ..."""
    logprobs: dict[int, list[TokenLogprobs]]
    """By row, for those that asked: one for each of its tokens."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """By row: the prompt positions whose next-token distribution this step computed, in order."""
    elapsed_s: float
    """Seconds the worker spent on the step."""
    waited_s: float = 0.0
    """Seconds the worker was idle before it received the plan."""
    invalid_rows: bytes = b""
    """Rows of the plan whose logits held NaN or infinity: nothing else here is valid for them."""
    ends: dict[int, Finish] = {}
    """By row, where the worker knows of an end: the text is complete (`stop`, with its last token), or nothing may
    follow (`error`, and its tokens are none)."""
    counts: bytes = b""
    """Parallel with `rows`: how many of `token_ids` are each row's; empty where each has one."""
    vectors: dict[int, bytes] = {}
    """By row, for tasks that do not generate: float32, a pooled vector or scores."""

    def tokens(self) -> list[list[int]]:
        """The tokens of each of `rows`."""
        token_ids = unpack_ids(self.token_ids).tolist()
        if not self.counts:
            return [[token_id] for token_id in token_ids]
        ends = list(accumulate(unpack_ids(self.counts)))
        return [token_ids[begin:end] for begin, end in zip([0, *ends], ends)]


class WorkerFailure(msgspec.Struct, frozen=True, array_like=True):
    """A worker's step failed: sent in place of a result."""

    rank: int
    epoch: int
    reason: str


# ---------------------------------------------------------------------------------------------- client <-> driver


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A client's first frame; the driver closes the socket where the token is wrong."""

    token: str
    client: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """`stream` is the client's number for choice 0; choice i is `stream + i`. Numbers are never used twice."""

    stream: int
    request: Request


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """The choice with this stream number is no longer wanted; its request's others go on. Unknown ones do nothing."""

    stream: int
    pauses: bool = False
    """It will be submitted again, when its reader has read what it has."""


class Adopt(msgspec.Struct, frozen=True, array_like=True, tag="adopt"):
    """Asks for a retained request (`Request.retention`): its choices get the numbers from `stream` on. Answered by
    `Adopted`."""

    stream: int
    client_key: str
    answer_id: str
    takes_over: bool = True
    """Also from a client that is served and reads it."""


class Forget(msgspec.Struct, frozen=True, array_like=True, tag="forget"):
    """That retained request will not be adopted any more. An unknown one does nothing."""

    client_key: str
    answer_id: str


class StatsQuery(msgspec.Struct, frozen=True, array_like=True, tag="stats?"):
    """Answered by `EngineStats` with the same `ticket`."""

    ticket: int


class ResetPrefixCache(msgspec.Struct, frozen=True, array_like=True, tag="reset_prefix_cache"):
    """Nothing computed before is used for requests that come after. Answered as a `StatsQuery` is."""

    ticket: int


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """How often values fell between the edges of an `observability.histogram.Histogram`, and their sum."""

    counts: list[int]
    total: float


class IngressReport(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    """What one ingress has counted (`observability.metrics`). Sent to the driver, which keeps the last of each client
    for the ingress that is asked for `/metrics`."""

    ingress: str
    counters: dict[str, list[tuple[list[str], float]]]
    """By metric: values of its labels, and its value."""
    histograms: dict[str, Distribution]


ClientMessage = Hello | Submit | Abort | Adopt | Forget | StatsQuery | ResetPrefixCache | IngressReport


READER_PAUSED = "reader_paused"
"""Code of the end of a choice that was to be submitted again when its reader has read what it has."""
ADOPTED_BY_ANOTHER = "adopted_by_another"
"""Code of the end that a client gets whose retained request another client adopted."""


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a choice ended. `reason`: `stop`, `length`, `abort` or `error`; `error` carries code and message."""

    reason: str
    stop_reason: int | None = None
    code: str | None = None
    message: str | None = None
    retry_after_s: float | None = None
    """With code `overloaded`: when to come back."""
    is_complete: bool = False
    """`stop` because a grammar allows no more: the last token is text like the others."""

    @property
    def has_stop_token(self) -> bool:
        """Whether the last token is there to end the choice, and is no part of its text."""
        return self.reason == "stop" and not self.is_complete


class Times(msgspec.Struct, frozen=True, array_like=True):
    """What a choice's first token took, as the driver saw it, in seconds."""

    queued_s: float
    """From the request's arrival there until the choice was first in a plan."""
    prefill_s: float
    """From then until the first token."""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice. Without tokens and without an end, it says that a request which another driver
    began to serve (`Request.emitted`) has come to run at this one."""

    stream: int
    """By which number the client that submitted the request knows this choice: `Submit.stream + choice`."""
    choice: int
    """Which choice of its request it is, from 0 to n - 1."""
    token_ids: bytes
    finish: Finish | None = None
    logprobs: list[TokenLogprobs] | None = None
    """Parallel with `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt positions 1.., once, with the first delta of choice 0."""
    num_cached_tokens: int = 0
    """Prompt tokens served from the prefix cache; only in the first delta."""
    times: Times | None = None
    """Said with the first delta; not again after a fault."""

    @property
    def is_start(self) -> bool:
        return not self.token_ids and self.finish is None


def single_tokens(delta: TokenDelta) -> list[TokenDelta]:
    """The same as deltas of one token each: the prompt's part with the first, the end with the last."""
    num_tokens = len(delta.token_ids) // 4
    if num_tokens < 2:
        return [delta]
    return [
        TokenDelta(
            delta.stream,
            delta.choice,
            delta.token_ids[4 * i : 4 * i + 4],
            delta.finish if i == num_tokens - 1 else None,
            None if delta.logprobs is None else delta.logprobs[i : i + 1],
            delta.prompt_logprobs if i == 0 else None,
            delta.num_cached_tokens if i == 0 else 0,
            delta.times if i == 0 else None,
        )
        for i in range(num_tokens)
    ]


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """One frame a step and client: everything that step added to that client's requests."""

    deltas: list[TokenDelta]


class Adopted(msgspec.Struct, frozen=True, array_like=True, tag="adopted"):
    """The answer to an `Adopt` with that `stream`. The request's deltas follow, from its first token on."""

    stream: int
    request: Request | None
    """None where none is retained under that name."""


class EngineStats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """A driver's counters and gauges; the ingress turns them into metrics. Totals only grow."""

    ticket: int
    healthy: bool
    reason: str
    """Why it is not healthy; empty else."""
    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int
    num_slots_filled: int
    """Token slots that hold a token, in the blocks used by running sequences."""
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    num_steps: int
    step_wait_s: float
    """Seconds, summed over steps, that rank 0 stood idle for want of a plan while work was there."""
    stalled_s: float = 0.0
    """Seconds since the last step was committed while work waits; 0 without work. Forward progress, for /health."""
    recovering: bool = False
    """A lost worker is being replaced: open requests wait, and will go on."""
    num_faults: int = 0
    """Workers' crashes and hangs that were noticed."""
    detection_s: float = 0.0
    """Of the last fault: seconds from the last sign of life (a plan sent, a result taken) until it was noticed."""
    gap_s: float = 0.0
    """Of the last fault: seconds from the step committed before it to the next one."""
    num_replays: int = 0
    """Sequences that lost their KV to a fault and were taken up again from their tokens."""
    num_recomputed_tokens: int = 0
    """Tokens whose KV was lost to faults."""
    recovery_s: dict[str, float] = {}  # msgspec copies it
    """Of the last fault: seconds by stage, from the loss to the next finished step."""
    faults: dict[str, int] = {}
    """`num_faults` by kind: `crash` and `hang`."""
    refusals: dict[str, int] = {}
    """Requests refused for overload, by the limit they met: `max_queued_requests`, `max_queued_tokens`, `deadline`."""
    num_driver_restarts: int = 0
    """Drivers that this one comes after."""
    step_tokens: Distribution | None = None
    """Tokens computed, by step."""
    step_gaps: Distribution | None = None
    """Seconds that rank 0 stood idle before a step, while work was there."""
    fault_detections: Distribution | None = None
    fault_gaps: Distribution | None = None
    """Every fault's `detection_s` and `gap_s`."""
    reports: list[IngressReport] = []
    """What the other clients reported last."""


DriverMessage = Deltas | Adopted | EngineStats
