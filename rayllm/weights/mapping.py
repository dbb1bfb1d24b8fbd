"""Checkpoint names for RayLLM's parameters, and parameters read from a checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.source import clip, pad_to

logger = logging.getLogger(__name__)

_DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")
"""Buffers that old checkpoints carry and that follow from config.json."""
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")
_MAX_NAMES_SHOWN = 8


def checkpoint_name(parameter: str, names: Mapping[str, str]) -> str:
    """The checkpoint's name of `parameter`; `names` maps modules (`layers.q`) to templates (`model.layers.{}.…`)."""
    module, _, leaf = parameter.rpartition(".")
    match = _LAYER.match(module)
    if match:
        return names[f"layers.{match[2]}"].format(match[1]) + "." + leaf
    return names[module] + "." + leaf


class CheckpointWeights:
    """Parameters out of a checkpoint. After all have been taken, `report_unused` names what nobody asked for."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, device: torch.device):
        self._checkpoint = checkpoint
        self._names = names
        self._dtype = dtype
        self._device = device
        self._used: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...], *, dim: int = 0, part: range | None = None) -> Tensor:
        source = checkpoint_name(name, self._names)
        found = self._checkpoint.shape(source)
        if found != shape:
            raise ConfigError(
                f"{self._checkpoint.file_of(source)}: tensor {source!r} has shape {list(found)}, "
                f"config.json asks for {list(shape)}"
            )
        self._used.add(source)
        if part is None:
            tensor = self._checkpoint.read(source, 0, range(shape[0]))
        else:
            tensor = pad_to(self._checkpoint.read(source, dim, clip(part, shape[dim])), dim, len(part))
        tensor = tensor.to(device=self._device, dtype=self._dtype)
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            # one such number would reach, through the shared KV pool, requests of other users
            raise ConfigError(
                f"{self._checkpoint.file_of(source)}: tensor {source!r} holds NaN or infinity as {self._dtype}"
            )
        return tensor

    def report_unused(self) -> None:
        """Warns of the checkpoint's tensors that no parameter took; buffers that follow from the config are no news."""
        unused = sorted(
            name for name in self._checkpoint.names() if name not in self._used and not _DERIVED.search(name)
        )
        if unused:
            shown = ", ".join(unused[:_MAX_NAMES_SHOWN])
            more = f" and {len(unused) - _MAX_NAMES_SHOWN} more" if len(unused) > _MAX_NAMES_SHOWN else ""
            logger.warning("%s: %d tensors are not used: %s%s", self._checkpoint.folder, len(unused), shown, more)
