"""Parameters read from a checkpoint, by the names of its architecture."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rayllm.errors import ConfigError
from rayllm.weights import stored
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.source import WeightSource, clip, pad_to

logger = logging.getLogger(__name__)

WeightNames = Mapping[str, "str | stored.Stored"]
"""Where an architecture's modules stand in a checkpoint. Keys are RayLLM's modules without the layer's number
(`layers.q`), or single parameters (`layers.q.bias`). A string is a tensor's name, and the parameter's own name
(`weight`, `bias`) is appended to a module's."""

_DERIVED = re.compile(r"\.(rotary_(pos_)?emb\.inv_freq|masked_bias|(attn|attention)\.bias)$")
"""Buffers that old checkpoints carry and that follow from config.json."""
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")
_MAX_NAMES_SHOWN = 8


def find_stored(parameter: str, names: WeightNames) -> stored.Stored:
    """Where RayLLM's `parameter` (`layers.3.q.weight`) stands in a checkpoint."""
    match = _LAYER.match(parameter)
    layer, key = (match[1], f"layers.{match[2]}") if match else ("", parameter)
    module, _, leaf = key.rpartition(".")
    place, suffix = (names[key], "") if key in names else (names[module], f".{leaf}")
    found = stored.Tensor(place) if isinstance(place, str) else place
    return found.renamed(lambda name: name.replace("{}", layer) + suffix)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating point holds no NaN and no infinity."""
    if tensor.sum().isfinite():  # half the time of `aminmax`; either of both spoils a sum
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())  # the sum alone may be too large


class CheckpointWeights(WeightSource):
    """Parameters out of a checkpoint. After all were read, `report_unused` names the tensors that were not."""

    def __init__(self, checkpoint: Checkpoint, names: WeightNames, dtype: torch.dtype, device: torch.device):
        self._checkpoint = checkpoint
        self._names = names
        self._dtype = dtype
        self._device = device

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dim: int = 0,
        part: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        place = find_stored(name, self._names)
        place.check(self._checkpoint, shape)
        return self._read(name, place, _cut(shape, dim, part), dim, part, dtype or self._dtype)

    def expert_tensors(
        self, name: str, shape: tuple[int, ...], experts: range, *, dim: int = 0, part: range | None = None
    ) -> Iterator[Tensor]:
        place = find_stored(name, self._names)
        place.check(self._checkpoint, shape)
        region = _cut(shape[1:], dim, part)
        for expert in experts:
            one = (range(expert, expert + 1), *region)
            yield self._read(name, place, one, dim + 1, part, self._dtype).squeeze(0)

    def _read(
        self, name: str, place: stored.Stored, region: stored.Region, dim: int, part: range | None, dtype: torch.dtype
    ) -> Tensor:
        tensor = place.read(self._checkpoint, region)
        if part is not None:
            tensor = pad_to(tensor, dim, len(part))
        if not tensor.dtype.is_floating_point:
            raise ConfigError(f"{self._where(name)} has dtype {tensor.dtype}: {name} must be floating point")
        tensor = tensor.to(device=self._device, dtype=dtype).contiguous()
        if not is_finite(tensor):
            # one such number would reach, through the shared KV pool, requests of other users
            raise ConfigError(f"{self._where(name)} holds NaN or infinity as {dtype}")
        return tensor

    def leave_to_others(self, name: str, shape: tuple[int, ...]) -> None:
        find_stored(name, self._names).check(self._checkpoint, shape)

    def report_unused(self, left_out: Sequence[str] = ()) -> None:
        """Warns of the checkpoint's tensors that no parameter took; buffers that follow from the config are no news.
        Those whose names begin with one of `left_out` are left out knowingly: they are counted in one line."""
        unused = [name for name in self._checkpoint.unused() if not _DERIVED.search(name)]
        found = [prefix for prefix in left_out if any(name.startswith(prefix) for name in unused)]
        if found:
            rest = [name for name in unused if not name.startswith(tuple(found))]
            logger.info(
                "%s: %d tensors are left out, since what they serve is not supported: %s",
                self._checkpoint.folder,
                len(unused) - len(rest),
                ", ".join(f"{prefix}*" for prefix in found),
            )
            unused = rest
        if unused:
            shown = ", ".join(unused[:_MAX_NAMES_SHOWN])
            more = f" and {len(unused) - _MAX_NAMES_SHOWN} more" if len(unused) > _MAX_NAMES_SHOWN else ""
            logger.warning(
                "%s: %d tensors of the checkpoint are not used: %s%s", self._checkpoint.folder, len(unused), shown, more
            )

    def _where(self, name: str) -> str:
        """The file and the tensor that hold a parameter; of a stack, the first."""
        place = find_stored(name, self._names)
        source = (place.found(self._checkpoint) if isinstance(place, stored.FirstOf) else place).name
        return f"{self._checkpoint.file_of(source)}: tensor {source!r}"


def _cut(shape: tuple[int, ...], dim: int, part: range | None) -> stored.Region:
    """The region of a parameter that `part` along `dim` leaves."""
    region = tuple(range(size) for size in shape)
    return region if part is None else (*region[:dim], clip(part, shape[dim]), *region[dim + 1 :])
