"""A served model and how far it is: what every endpoint asks first."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from rayllm.api.body import max_body_bytes, max_values
from rayllm.api.errors import NotReadyError
from rayllm.config import ResolvedConfig
from rayllm.engine.client.protocols import EngineClient
from rayllm.errors import RayLLMError, RequestError, shorten
from rayllm.messages import EngineStats
from rayllm.observability.metrics import Metrics
from rayllm.prompt.text_model import TextModel
from rayllm.structured.trial import GrammarTrials
from rayllm.text.tokenizer import Tokenizer

READY = "ready"
DRAINING = "shutting down"
_DRAINING_REASON = "open requests are finished, new ones are not taken"
HEALTH_TIMEOUT_S = 3.0
_INLINE_CHARACTERS = 8192
"""Texts up to this long are rendered and tokenized at once, in well under a millisecond; others in a
thread."""
_SLOW_TEMPLATE_S = 0.02


Task = Literal["generate", "embed", "score", "classify", "pool"]
_NEEDS: dict[Task, str] = {
    "generate": "generate text: that needs a decoder with a language-model head",
    "embed": "make embeddings: that needs an embedding model (an encoder, or a decoder with a pooling head)",
    "score": "score or rerank texts: that needs a cross-encoder or an embedding model",
    "classify": "classify texts: that needs a model with a classification head",
    "pool": "pool hidden states: that needs a model served for pooling",
}


@dataclass(frozen=True)
class ServedModel(TextModel):
    """All that answers need."""

    engine: EngineClient
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    has_slow_template: bool = False
    grammars: GrammarTrials | None = None
    """Tries what answers shall follow; without it, workers find out."""
    tasks: frozenset[Task] = frozenset({"generate"})
    """What the engine can do with this model."""

    def require(self, task: Task) -> None:
        """Raises `RequestError` where the model cannot do that."""
        if task not in self.tasks:
            raise RequestError(
                f"the model {self.name!r} cannot {_NEEDS[task]}; it serves: {', '.join(sorted(self.tasks))}",
                param="model",
                code="unsupported_model",
            )

    @property
    def name(self) -> str:
        """The name that answers give."""
        return self.config.served_model_name

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may give, `name` first."""
        return (self.name, *self.config.served_model_aliases)

    @cached_property
    def fingerprint(self) -> str:
        """Changes where answers may change: with the model's configuration."""
        return "fp_" + hashlib.blake2b(self.config.model_dump_json().encode(), digest_size=5).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.config.shape.vocab_size

    def prepares_inline(self, num_characters: int, *, is_chat: bool) -> bool:
        """Whether rendering and tokenizing is short enough for the event loop."""
        return num_characters <= _INLINE_CHARACTERS and not (is_chat and self.has_slow_template)


@dataclass(frozen=True)
class Health:
    """`stage` is `ready` for a model that can answer; `reason` says why it is not healthy."""

    healthy: bool
    stage: str
    reason: str = ""


class ModelService:
    """The model behind the endpoints. It begins not ready; `set_ready` gives it all it needs.

    `ingress`: this process's name in the metrics, where there are several. `grammars`: tries those of requests."""

    def __init__(self, stage: str = "starting", ingress: str = "", grammars: GrammarTrials | None = None):
        self._grammars = grammars
        self._stage = stage
        self._reason = ""
        self._model: ServedModel | None = None
        self._metrics: Metrics | None = None
        self._draining = False
        self._ingress = ingress

    def set_stage(self, stage: str, reason: str = "") -> None:
        """Not ready (any more): how far it is, or why it cannot go on. Shown by `/health` and refused
        requests."""
        self._stage, self._reason = stage, reason
        self._model = None

    def set_ready(self, config: ResolvedConfig, tokenizer: Tokenizer, engine: EngineClient) -> None:
        """Answers from now on. Called again (the engine came back), metrics go on as they were."""
        if self._metrics is None:
            self._metrics = Metrics(config.served_model_name, _cache_info(config), self._ingress)
        self._model = ServedModel(
            config,
            tokenizer,
            engine,
            self._metrics,
            has_slow_template=_has_slow_template(tokenizer),
            grammars=self._grammars,
        )
        self._stage, self._reason = READY, ""

    def note_driver_lost(self) -> None:
        if self._metrics is not None:
            self._metrics.driver_lost()

    def note_replay(self, gap_s: float, num_tokens: int) -> None:
        """A request went on with another driver: seconds without a token, tokens computed again."""
        if self._metrics is not None:
            self._metrics.request_replayed(gap_s, num_tokens)

    def note_answer(self, handler: str, method: str, status: int) -> None:
        if self._metrics is not None:
            self._metrics.answered(handler, method, status)

    @property
    def max_body_bytes(self) -> int:
        """The largest body that the model can use; where there is none yet, any."""
        if self._model is None:
            return sys.maxsize
        return max_body_bytes(self._model.config.max_model_len, self._model.vocab_size)

    @property
    def max_values(self) -> int:
        """The most entries that a body may hold."""
        return max_values(0 if self._model is None else self._model.config.max_model_len)

    @property
    def stage(self) -> str:
        return self._stage

    @property
    def engine(self) -> EngineClient | None:
        """None while there is none."""
        return None if self._model is None else self._model.engine

    @property
    def metrics(self) -> Metrics | None:
        """None until the model was ready once."""
        return self._metrics

    def drain(self) -> int:
        """New requests are refused from now on; returns how many are still open. May be called again."""
        self._draining = True
        return self._metrics.num_open if self._metrics else 0

    def ready(self) -> Health:
        """Whether new requests are taken here, without asking the engine."""
        if self._draining:
            return Health(False, DRAINING, _DRAINING_REASON)
        return Health(self._model is not None, self._stage, self._reason)

    def model(self) -> ServedModel:
        """Raises `NotReadyError`."""
        if self._draining:
            raise NotReadyError(DRAINING, _DRAINING_REASON)
        if self._model is None:
            raise NotReadyError(self._stage, self._reason)
        return self._model

    def named(self, name: str | None) -> ServedModel:
        """The model of that name (None: whichever it is). Raises `NotReadyError`, or `RequestError` (404)."""
        model = self.model()
        if name is not None and name not in model.names:
            served = ", ".join(map(repr, model.names))
            raise RequestError(
                f"the model {shorten(name)} does not exist; this server has {served}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return model

    async def engine_stats(self) -> EngineStats | None:
        """The engine's stats; None where it does not answer in time."""
        if self._model is None:
            return None
        try:
            return await asyncio.wait_for(self._model.engine.stats(), HEALTH_TIMEOUT_S)
        except (RayLLMError, asyncio.TimeoutError):
            return None

    async def render_metrics(self) -> bytes:
        """The text of `/metrics`; empty until the model was ready once."""
        stats = await self.engine_stats()
        return self._metrics.render(stats, stats.reports if stats else ()) if self._metrics else b""

    async def health(self) -> Health:
        """Whether the engine makes progress, asked of the engine itself."""
        if self._model is None:
            return Health(False, self._stage, self._reason)
        stats = await self.engine_stats()
        if stats is None:
            return Health(False, self._stage, f"the engine did not answer within {HEALTH_TIMEOUT_S:g} s")
        return Health(stats.healthy, self._stage, stats.reason)


def _cache_info(config: ResolvedConfig) -> dict[str, object]:
    """Labels of `vllm:cache_config_info`."""
    return {
        "block_size": config.block_size,
        "cache_dtype": config.dtype,
        "enable_prefix_caching": config.engine.enable_prefix_caching,
        "gpu_memory_utilization": config.engine.gpu_memory_utilization,
    }


def _has_slow_template(tokenizer: Tokenizer) -> bool:
    """Renders a short chat twice: the first time also finds out what the template takes."""
    used_s = 0.0
    for _ in range(2):
        start_s = time.thread_time()
        with contextlib.suppress(RequestError):
            tokenizer.render_chat([{"role": "user", "content": "hello"}])
        used_s = time.thread_time() - start_s
    return used_s > _SLOW_TEMPLATE_S
