"""Models: their specs as data, the decoder that runs them, and how its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from rayllm.distributed.groups import TensorParallel
    from rayllm.models.decoder import Decoder
    from rayllm.models.spec import DecoderSpec


def load_decoder(
    model_path: str,
    spec: DecoderSpec,
    tp: TensorParallel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """This rank's share of the model in folder `model_path`, read slice by slice.

    `load_format`: "auto" or "safetensors" reads the folder; "dummy" draws weights from `seed`, whatever the number of
    ranks, and needs no weight file. Faults of the folder are `ConfigError`.
    """
    from rayllm.models.decoder import Decoder
    from rayllm.models.registry import weight_names
    from rayllm.weights.checkpoint import Checkpoint
    from rayllm.weights.mapping import CheckpointWeights
    from rayllm.weights.source import DummyWeights

    if load_format == "dummy":
        return Decoder(spec, DummyWeights(seed, dtype, device), tp, dtype, device)
    if load_format not in ("auto", "safetensors"):
        raise ConfigError(f"load_format={load_format!r} is not known; known are auto, safetensors, dummy")
    weights = CheckpointWeights(Checkpoint(model_path), weight_names(spec.architecture), dtype, device)
    decoder = Decoder(spec, weights, tp, dtype, device)
    weights.report_unused()
    return decoder
