"""A request as it goes to a driver."""

from __future__ import annotations

from array import array

import msgspec

from rayllm.request.sampling_params import SamplingParams
from rayllm.request.token_ids import unpack_ids


class Retention(msgspec.Struct, frozen=True, array_like=True):
    """Has the driver retain a request that outlives its client (`engine.driver.retained_requests`)."""

    answer_id: str
    """The name by which a client adopts it, together with the request's `client_key`."""
    response_context: bytes
    """What an ingress needs to rebuild the response from the tokens; opaque to the driver."""
    in_background: bool = False
    """No client reads it while it runs: any client may adopt it."""
    history: bytes = b""
    """The deltas that a previous, lost driver had sent: an encoded `engine.delta_history.DeltaHistory`."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress asks of a driver: token ids and numbers only, complete, never changed.

    Its choices are `params.n` token streams. `seed` and `max_tokens` are resolved by whoever submits (a request
    replayed after a fault must draw the same numbers). `emitted` holds, per choice, the ids already sent, when a
    request is continued; they count against `max_tokens`.
    """

    request_id: str
    prompt: bytes
    """int32 token ids, see `pack_ids`; never empty."""
    params: SamplingParams
    seed: int
    max_tokens: int
    """New tokens allowed for each choice; prompt + max_tokens fits the model's context."""
    priority: int = 0
    """Lower is served first (vLLM's convention); equal priorities in order of arrival."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only among requests with the same salt."""
    deadline_s: float | None = None
    """Unix time after which the request is ended."""
    emitted: tuple[bytes, ...] = ()
    client_key: str = ""
    """Whose request it is: clients with the same priority get equal shares of the engine."""
    log_id: str = ""
    """What log lines call it in every process: the client's `x-request-id`."""
    traceparent: str = ""
    """W3C trace context of the span that it belongs to; empty where nothing is traced."""
    retention: Retention | None = None
    """Set where it outlives its client."""

    @property
    def prompt_token_ids(self) -> array[int]:
        return unpack_ids(self.prompt)
