"""Which files of a model's folder hold its weights. Plain Python."""

from __future__ import annotations

import re
from pathlib import Path

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def index_file(folder: Path) -> Path | None:
    """The file that says which file holds a tensor; None where it is not needed, or not there."""
    index = folder / INDEX
    return index if index.exists() and not (folder / WHOLE).exists() else None


def safetensors_files(folder: Path) -> list[Path]:
    """The files to read where no index says it, by the names that `transformers` looks for: the one whole file, else
    the numbered ones, else all. Others beside them are copies of the weights in another form, as
    `consolidated.safetensors` is."""
    whole = folder / WHOLE
    if whole.exists():
        return [whole]
    found = sorted(folder.glob("*.safetensors"))
    return [path for path in found if _SHARD.fullmatch(path.name)] or found
