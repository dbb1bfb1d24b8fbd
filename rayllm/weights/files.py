"""Which files of a model's folder hold its weights. Plain Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rayllm.errors import ConfigError
from rayllm.weights.config_file import read_json


@dataclass(frozen=True)
class WeightForm:
    """One way to store weights, by the names that `transformers` looks for."""

    whole: str
    index: str
    shard: re.Pattern[str]
    suffix: str

    def index_file(self, folder: Path) -> Path | None:
        """The file that says which file holds a tensor; None where it is not needed, or not there."""
        index = folder / self.index
        return index if index.exists() and not (folder / self.whole).exists() else None

    def files(self, folder: Path) -> list[Path]:
        """The files to read where no index says it: the one whole file, else the numbered ones."""
        whole = folder / self.whole
        if whole.exists():
            return [whole]
        found = sorted(folder.glob(f"*{self.suffix}"))
        return [path for path in found if self.shard.fullmatch(path.name)]

    def weight_map(self, index: Path) -> dict[str, Path]:
        """The file of each tensor, as an index file says it. `ConfigError` where it names a file that is not beside it,
        or is not of this form."""
        given = read_json(index).get("weight_map")
        if not isinstance(given, dict) or not given:
            raise ConfigError(f"{index}: weight_map must be an object of tensor names and file names")
        for name in dict.fromkeys(map(str, given.values())):
            if Path(name).name != name or not name.endswith(self.suffix):
                raise ConfigError(
                    f"{index}: weight_map names {name!r}; it must be a {self.suffix} file in the same folder"
                )
            if not (index.parent / name).exists():
                raise ConfigError(f"{index}: its file {name} cannot be read: it does not exist")
        return {tensor: index.parent / str(name) for tensor, name in given.items()}

    def is_in(self, folder: Path) -> bool:
        return self.index_file(folder) is not None or bool(self.files(folder))


SAFETENSORS = WeightForm(
    "model.safetensors",
    "model.safetensors.index.json",
    re.compile(r"model-\d+-of-\d+\.safetensors"),
    ".safetensors",
)
PICKLED = WeightForm(
    "pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin"), ".bin"
)
"""PyTorch's own files. Read only where there are no safetensors files."""


def index_file(folder: Path) -> Path | None:
    """As `WeightForm.index_file`, of safetensors files."""
    return SAFETENSORS.index_file(folder)


def safetensors_files(folder: Path) -> list[Path]:
    """As `WeightForm.files`, of safetensors; without a file of a usual name, all. Others beside those are copies of the
    weights in another form, as `consolidated.safetensors` is."""
    return SAFETENSORS.files(folder) or sorted(folder.glob("*.safetensors"))


def holds_weights(folder: Path) -> bool:
    """Whether any file of weights that can be read is there."""
    return bool(index_file(folder) or safetensors_files(folder)) or PICKLED.is_in(folder)
