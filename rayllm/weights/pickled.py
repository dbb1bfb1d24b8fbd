"""PyTorch's own weight files (`pytorch_model.bin`), read as tensors alone: a file that holds code is refused."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllm.errors import ConfigError

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class PickledSlice:
    """A tensor of a file, in the shape of safetensors' slices."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self.num_bytes = tensor.nbytes

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, part: Any) -> Tensor:
        return self._tensor[part]


class PickledFile:
    """A file's tensors, mapped where its format allows it, in the shape of safetensors' files. Raises `ConfigError` for
    a file that is no state dictionary, cannot be read, or would run code."""

    def __init__(self, path: Path):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ConfigError(_refusal(path, str(error))) from None
        except Exception as error:  # the library raises errors of many kinds for damaged files
            size = f"{path.stat().st_size} bytes; it may have been cut short: download it again"
            raise ConfigError(f"{path} is not a readable PyTorch file ({_one_line(error)}; {size})") from None
        tensors = loaded if isinstance(loaded, dict) else {}
        self._tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise ConfigError(f"{path} holds no tensors by name: give the state dictionary of the model")

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> PickledSlice:
        return PickledSlice(self._tensors[name])


def _refusal(path: Path, reason: str) -> str:
    found = _GLOBAL.search(reason)
    if found is None:
        return f"{path} is not a readable PyTorch file: {' '.join(reason.split())[:200]}"
    return (
        f"{path} is refused: it is a pickle that calls {found[1]}, and only tensors are read; convert it to "
        "safetensors on a machine where you trust it"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
