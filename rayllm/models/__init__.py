"""Models: their specs as data, the decoder that runs them, and how its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from rayllm.distributed.groups import TensorParallel
    from rayllm.kv_layout import KVGroup
    from rayllm.layers.attention import AttentionBackend
    from rayllm.layers.batch import Batch
    from rayllm.layers.kv_cache import KVPool, KVSpec
    from rayllm.models.decoder import Decoder
    from rayllm.models.fallback.decoder import TransformersDecoder
    from rayllm.spec import DecoderSpec
    from rayllm.weights.progress import LoadProgress
    from rayllm.weights.source import WeightSource


@dataclass(frozen=True)
class Model:
    """One rank's share of a model, with what computes its attention. Use it under `torch.inference_mode()`."""

    decoder: Decoder | TransformersDecoder
    backend: AttentionBackend
    kv_specs: list[KVSpec]
    """Of each part of a KV block."""
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers that share a block table."""
        from rayllm.kv_layout import kv_groups

        return kv_groups(self.decoder.spec)

    def allocate_kv(self, num_blocks: int, block_size: int) -> KVPool:
        """A KV cache of this shape; what it holds is not known."""
        from rayllm.kv_layout import group_and_part
        from rayllm.layers.kv_cache import KVPool

        part_of_layer = [part for _, part in group_and_part(self.kv_groups)]
        return KVPool(self.kv_specs, num_blocks, block_size, self.dtype, self.device, part_of_layer)

    def forward(self, batch: Batch, pool: KVPool) -> torch.Tensor:
        """Hidden states of the positions that the batch wants, `[N, D]`; see `Decoder.forward`."""
        return self.decoder.forward(batch, pool.layers, self.backend.prepare(batch))

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """`[N, V]` float32, the same bits on every rank."""
        return self.decoder.logits(hidden_ND)


def load_model(
    model_path: str,
    spec: DecoderSpec,
    tp: TensorParallel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    architecture_module: str = "",
    attention_backend: str = "auto",
    block_size: int = 64,
    progress: LoadProgress | None = None,
) -> Model:
    """This rank's share of the model in folder `model_path`, read slice by slice.

    `load_format`: "auto", "safetensors" or "pt" reads the folder; "dummy" draws weights from `seed`, whatever the
    number of ranks, and needs no weight file. `architecture_module`: where the architecture is not in this process's
    registry (`ResolvedConfig.architecture_module`). `attention_backend` and `block_size`: see
    `layers.attention.choose_backend`. `progress` counts the bytes that are read. Faults of the folder are
    `ConfigError`.
    """
    from rayllm.models.registry import left_out, weight_names
    from rayllm.weights.checkpoint import Checkpoint
    from rayllm.weights.checkpoint_weights import CheckpointWeights
    from rayllm.weights.source import DummyWeights

    if load_format not in ("auto", "safetensors", "pt", "dummy"):
        raise ConfigError(f"load_format={load_format!r} is not known; known are auto, safetensors, pt, dummy")
    if spec.transformers is not None:
        from rayllm.models.decoder import kv_specs
        from rayllm.models.fallback.build import load_decoder

        decoder, backend = load_decoder(
            model_path, spec, tp, dtype, device, load_format, seed, progress, attention_backend, block_size
        )
        return Model(decoder, backend, kv_specs(spec, tp.size), dtype, device)
    if load_format == "dummy":
        return build_model(spec, DummyWeights(seed, dtype, device), tp, dtype, device, attention_backend, block_size)
    weights = CheckpointWeights(
        Checkpoint(model_path, load_format, progress), weight_names(spec, architecture_module), dtype, device
    )
    model = build_model(spec, weights, tp, dtype, device, attention_backend, block_size)
    if tp.rank == 0:  # what is not used is the same on every rank
        weights.report_unused(left_out(spec, architecture_module))
    return model


def build_model(
    spec: DecoderSpec,
    weights: WeightSource,
    tp: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
    attention_backend: str = "auto",
    block_size: int = 64,
) -> Model:
    """A rank's model with parameters from `weights`. The spec can be split over the ranks: see `models.split`."""
    from rayllm.layers.attention import choose_backend
    from rayllm.models.decoder import Decoder, attention_groups, attention_needs, kv_specs

    needs = attention_needs(spec, tp.size, block_size, dtype, device)
    backend = choose_backend(attention_groups(spec, tp.rank, tp.size), needs, attention_backend)
    decoder = Decoder(spec, weights, tp, backend, dtype, device)
    return Model(decoder, backend, kv_specs(spec, tp.size), dtype, device)
