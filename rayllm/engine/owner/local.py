"""The whole engine in this process: scheduler, loop and one runner, no Ray. Also how the engine is unit-tested."""

from __future__ import annotations

from collections.abc import Callable

from rayllm.config import ResolvedConfig
from rayllm.engine.driver.loop import EngineLoop
from rayllm.executor.executor import Executor, Selectable, wait_readable
from rayllm.messages import Abort, Deltas, DriverMessage, EngineStats, ResetPrefixCache, Submit, TokenDelta
from rayllm.models.memory_plan import fit_context
from rayllm.request import Request
from rayllm.scheduler.scheduler import Scheduler


def build_scheduler(config: ResolvedConfig, num_blocks: int) -> Scheduler:
    """The scheduler of an engine whose workers hold `num_blocks` KV blocks each."""
    return Scheduler(
        num_blocks=num_blocks,
        kv_spans=config.kv_spans(),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        enable_prefix_caching=config.engine.enable_prefix_caching,
        eos_token_ids=config.shape.eos_token_ids,
        max_inflight_steps=config.engine.layout.max_inflight_steps,
        rope_boundary=config.spec.rope_boundary,
    )


class LocalEngine:
    """A `BlockingEngineClient` that computes in `receive`, on the caller's thread; given a `wake`, one step at most."""

    def __init__(
        self, config: ResolvedConfig, executor: Executor, after_step: Callable[[EngineLoop], None] | None = None
    ):
        config = fit_context(config, executor.num_blocks)
        self.config = config
        self._executor = executor
        self._deltas: list[TokenDelta] = []
        self._after_step = after_step
        self.loop = EngineLoop(config, build_scheduler(config, executor.num_blocks), executor, self._deliver)

    def _deliver(self, client: object, message: DriverMessage) -> None:
        if isinstance(message, Deltas):
            self._deltas += message.deltas

    def submit(self, stream: int, request: Request) -> None:
        self.loop.submit("local", Submit(stream, request))

    def abort(self, stream: int) -> None:
        self.loop.submit("local", Abort(stream))

    def receive(self, wake: Selectable | None = None) -> list[TokenDelta]:
        while not self._deltas and self.loop.step():
            if self._after_step is not None:
                self._after_step(self.loop)
            if wake is not None:
                break
        else:
            if wake is not None and not self._deltas:  # without work
                wait_readable(wake)
        deltas, self._deltas = self._deltas, []
        return deltas

    def stats(self) -> EngineStats:
        return self.loop.stats()

    def reset_prefix_cache(self) -> None:
        self.loop.submit("local", ResetPrefixCache(0))

    def close(self) -> None:
        self._executor.close()
