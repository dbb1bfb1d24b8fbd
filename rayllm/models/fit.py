"""Whether a model fits a device, and what would make it fit. Plain Python, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError
from rayllm.kv_layout import num_sequences_in
from rayllm.models.memory_plan import MemoryNeeds, kv_budget, least_context
from rayllm.models.split import check_split

_MAX_GPU_UTILIZATION = 0.97
_SMALL_STEP = {"max_num_seqs": 16, "max_num_batched_tokens": 512}


@dataclass(frozen=True)
class Fit:
    """One rank's memory, shared out."""

    config: ResolvedConfig
    needs: MemoryNeeds
    kv_bytes: int
    """Room for KV; 0 where weights and activations fill the device."""

    @classmethod
    def of(cls, config: ResolvedConfig, device_bytes: int) -> Fit:
        """`device_bytes`: as for `kv_budget`."""
        needs = MemoryNeeds.of_config(config)
        return cls(config, needs, kv_budget(config, needs, device_bytes))

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV there is room for, in sequences as long as they may be."""
        longest = self.max_model_len
        return int(num_sequences_in(self.needs.kv_spans, self._num_blocks, longest) * longest) if longest else 0

    @property
    def _num_blocks(self) -> int:
        return self.kv_bytes // self.needs.kv_per_block

    @property
    def max_model_len(self) -> int:
        """The longest context that fits, of the one that is asked for or the model has; 0 where none does."""
        return self.needs.max_tokens(self._num_blocks, self.config.max_model_len)

    @property
    def is_enough(self) -> bool:
        return self.max_model_len >= least_context(self.config.engine.max_model_len, self.config.max_model_len)

    def num_requests(self, num_tokens: int) -> float:
        """Requests of so many tokens that are held at once, no more than `max_num_seqs`."""
        return min(num_sequences_in(self.needs.kv_spans, self._num_blocks, num_tokens), self.config.max_num_seqs)


def remedies(config: ResolvedConfig, device_bytes: int) -> Iterator[dict[str, Any]]:
    """Settings, each by itself, with which a model that does not fit would: a shorter context, more ranks, 16-bit
    weights, smaller steps, more of the GPU."""
    context = Fit.of(config, device_bytes).max_model_len
    if context >= config.block_size:
        yield {"max_model_len": context}
    if config.dtype == "float32":
        yield from _that_fit(config, device_bytes, [{"dtype": "bfloat16"}])
    sizes = [2**power for power in range(1, 7) if 2**power > config.engine.tensor_parallel_size]
    yield from _that_fit(config, device_bytes, [{"tensor_parallel_size": size} for size in sizes])
    small = {name: value for name, value in _SMALL_STEP.items() if getattr(config, name) > value}
    yield from _that_fit(config, device_bytes, [small] if small else [])
    if config.device == "cuda" and config.engine.gpu_memory_utilization < _MAX_GPU_UTILIZATION:
        yield from _that_fit(config, device_bytes, [{"gpu_memory_utilization": _MAX_GPU_UTILIZATION}])


def _that_fit(config: ResolvedConfig, device_bytes: int, tried: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first that fits."""
    for changes in tried:
        changed = _changed(config, changes)
        try:
            check_split(changed.spec, changed.engine.layout)
        except ConfigError:
            continue
        if Fit.of(changed, device_bytes).is_enough:
            yield changes
            return


def _changed(config: ResolvedConfig, changes: dict[str, Any]) -> ResolvedConfig:
    own = {name: value for name, value in changes.items() if name in ResolvedConfig.model_fields}
    changed: ResolvedConfig = config.model_copy(update={"engine": config.engine.model_copy(update=changes), **own})
    return changed
