"""The type of a checkpoint's weights, from the headers of its safetensors files. Plain Python: no tensor is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rayllm.errors import ConfigError
from rayllm.weights.safetensors_header import folder_tensors

_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(folder: str | Path) -> str | None:
    """The type that most of the weights (by their number) have; on equal numbers the wider one.

    None where there are no safetensors files, or none that can be read: loading them says what is wrong.
    """
    num_elements: Counter[str] = Counter()
    try:
        entries = folder_tensors(Path(folder)).values()
    except ConfigError:
        return None
    for entry in entries:
        if entry.dtype in _DTYPES:
            num_elements[_DTYPES[entry.dtype]] += entry.num_elements
    by_width = ("float32", "bfloat16", "float16")
    return max(num_elements, key=lambda dtype: (num_elements[dtype], -by_width.index(dtype)), default=None)
