"""What a safetensors file says of its tensors: name, type, shape and place, without reading any. Plain Python.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, little-endian; the header,
a JSON object; the tensors' bytes, one after another without gaps, each row-major.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError
from rayllm.weights.config_file import check_regular_file
from rayllm.weights.files import SAFETENSORS, index_file, safetensors_files

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_METADATA = "__metadata__"
_BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `dtype` by safetensors' names. Its bytes stand at `begin` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name, in the order of their places. `ConfigError` that names the file for one that is
    not whole or not of this format."""
    check_regular_file(path)
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH.size)
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else -1
            if length < 0 or _LENGTH.size + length > num_bytes:
                raise _Unreadable(f"it ends after {num_bytes} bytes, within its header")
            if length > _MAX_HEADER_BYTES:
                raise _Unreadable(f"its header has {length} bytes, more than {_MAX_HEADER_BYTES}")
            header = json.loads(file.read(length))
        return _entries(header, _LENGTH.size + length, num_bytes)
    except _Unreadable as error:
        reason = str(error)
    except RecursionError:
        reason = "its header is nested too deeply"
    except (OSError, ValueError) as error:
        reason = f"its header is not JSON ({' '.join(str(error).split())[:200]})"
    raise ConfigError(f"{path} is not a readable safetensors file: {reason}")


class _Unreadable(Exception):
    pass


def _entries(header: Any, data_begin: int, num_bytes: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise _Unreadable(f"its header is {type(header).__name__}, not an object")
    found = {name: _entry(name, given, data_begin) for name, given in header.items() if name != _METADATA}
    found = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = data_begin
    for name, entry in found.items():
        if entry.begin != place:
            raise _Unreadable(f"tensor {name!r} begins at byte {entry.begin}, not {place}, where the one before ends")
        place = entry.end
    if place != num_bytes:
        raise _Unreadable(f"it has {num_bytes} bytes, but its header describes {place}: copy or download it again")
    return found


def _entry(name: str, given: Any, data_begin: int) -> TensorEntry:
    fields: Mapping[str, Any] = given if isinstance(given, dict) else {}
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Unreadable(f"tensor {name!r} has dtype {dtype!r}, which is not known")
    shape, offsets = _sizes(name, fields, "shape"), _sizes(name, fields, "data_offsets")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _Unreadable(f"tensor {name!r} has data_offsets {list(offsets)}")
    entry = TensorEntry(dtype, shape, data_begin + offsets[0], data_begin + offsets[1])
    if entry.num_elements * _BITS[dtype] != 8 * entry.num_bytes:
        raise _Unreadable(f"tensor {name!r} of shape {list(shape)} in {dtype} cannot have {entry.num_bytes} bytes")
    return entry


def _sizes(name: str, fields: Mapping[str, Any], field: str) -> tuple[int, ...]:
    value = fields.get(field)
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise _Unreadable(f"tensor {name!r} has {field} {value!r}")
    return tuple(value)


def folder_tensors(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder's safetensors files, by name; empty where it has none. Raises as `read_header`."""
    index = index_file(folder)
    if index is None:
        paths = safetensors_files(folder)
    else:
        paths = list(dict.fromkeys(SAFETENSORS.weight_map(index).values()))
    return {name: entry for path in paths for name, entry in read_header(path).items()}
