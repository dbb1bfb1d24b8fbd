"""The line about an engine's work, in vLLM's form."""

from __future__ import annotations

from dataclasses import dataclass

PERIOD_S = 10.0


@dataclass(frozen=True, slots=True)
class StatisticsSample:
    """An engine at one moment; totals only grow."""

    num_prompt_tokens: int
    """Of sequences that came to run."""
    num_generation_tokens: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int
    prefix_queries: int
    prefix_hits: int

    @property
    def is_idle(self) -> bool:
        return not self.num_running and not self.num_waiting


class StatisticsLine:
    """Says what was done between two looks; nothing where nothing was."""

    def __init__(self, now: float, sample: StatisticsSample, *, is_gpu: bool):
        self._looked_at, self._before = now, sample
        self._device = "GPU " if is_gpu else ""

    def look(self, now: float, sample: StatisticsSample) -> str | None:
        elapsed_s, before = now - self._looked_at, self._before
        self._looked_at, self._before = now, sample
        num_prompt = sample.num_prompt_tokens - before.num_prompt_tokens
        num_generated = sample.num_generation_tokens - before.num_generation_tokens
        if elapsed_s <= 0 or (sample.is_idle and not num_prompt and not num_generated):
            return None
        hits, queries = sample.prefix_hits - before.prefix_hits, sample.prefix_queries - before.prefix_queries
        if not queries:
            hits, queries = sample.prefix_hits, sample.prefix_queries
        return (
            f"Engine 000: Avg prompt throughput: {num_prompt / elapsed_s:.1f} tokens/s, "
            f"Avg generation throughput: {num_generated / elapsed_s:.1f} tokens/s, "
            f"Running: {sample.num_running} reqs, Waiting: {sample.num_waiting} reqs, "
            f"{self._device}KV cache usage: {100 * sample.num_blocks_used / max(1, sample.num_blocks):.1f}%, "
            f"Prefix cache hit rate: {100 * hits / max(1, queries):.1f}%"
        )
