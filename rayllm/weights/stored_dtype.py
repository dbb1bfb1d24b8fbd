"""The type of a checkpoint's weights, from the headers of its safetensors files. Plain Python: no tensor is read."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from rayllm.weights.files import index_file, safetensors_files

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(folder: str | Path) -> str | None:
    """The type that most of the weights (by their number) have; on equal numbers the wider one.

    None where there are no safetensors files, or none that can be read: loading them says what is wrong.
    """
    num_elements: Counter[str] = Counter()
    for path in _files(Path(folder)):
        for entry in _header(path).values():
            if isinstance(entry, dict) and entry.get("dtype") in _DTYPES:
                num_elements[_DTYPES[entry["dtype"]]] += _num_elements(entry.get("shape"))
    by_width = ("float32", "bfloat16", "float16")
    return max(num_elements, key=lambda dtype: (num_elements[dtype], -by_width.index(dtype)), default=None)


def _num_elements(shape: Any) -> int:
    is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
    return math.prod(shape) if is_shape else 0


def _files(folder: Path) -> list[Path]:
    index = index_file(folder)
    if index is not None:
        try:
            names = dict.fromkeys(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        return [folder / str(name) for name in names]
    return safetensors_files(folder)


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a pipe would wait for ever
        return {}
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
    except (OSError, ValueError, struct.error, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}
