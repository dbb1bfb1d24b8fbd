"""What an engine runs with: the user's config, the model and the machine, resolved once by `engine.owner.resolve`."""

from __future__ import annotations

from typing import Literal

from rayllm.config.base import BaseConfig
from rayllm.config.engine import Backend, EngineConfig
from rayllm.config.generation import GenerationDefaults
from rayllm.kv_layout import KVSpan, kv_groups, kv_spans, num_sequences_in
from rayllm.spec import DecoderSpec


class ModelShape(BaseConfig):
    """What the driver needs of a model; no tensor in it."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    """The tokenizer's end token first. Where another one ends an answer, `stop_reason` says which."""
    num_layers: int


class ResolvedConfig(BaseConfig):
    """Config + model + device, decided once. Every process of an engine is given this same object."""

    engine: EngineConfig
    model_path: str
    tokenizer_path: str
    served_model_name: str
    served_model_aliases: tuple[str, ...] = ()
    """More names by which clients may call the model."""
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    backend: Backend
    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    shape: ModelShape
    spec: DecoderSpec
    """What the model is made of: its config.json is read once, when this is resolved."""
    architecture_module: str = ""
    """Import path of the module that has the model's architecture, where it is not one of RayLLM's own."""
    num_threads: int
    """OpenMP threads of each worker on CPU."""
    generation: GenerationDefaults = GenerationDefaults()

    def kv_spans(self) -> tuple[KVSpan, ...]:
        """Which blocks a sequence holds in each of the model's KV groups."""
        return kv_spans(
            [group.window for group in kv_groups(self.spec)],
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_inflight_steps=self.engine.layout.max_inflight_steps,
        )

    def num_full_sequences(self, num_blocks: int) -> float:
        """Sequences of `max_model_len` tokens that so many KV blocks hold at once."""
        return num_sequences_in(self.kv_spans(), num_blocks, self.max_model_len)
