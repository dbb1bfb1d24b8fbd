"""The weight files of a model folder. Nothing in them is executed; each fault is one line."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rayllm.errors import ConfigError, did_you_mean
from rayllm.weights.config_file import check_regular_file
from rayllm.weights.files import PICKLED, SAFETENSORS, WeightForm, index_file, safetensors_files
from rayllm.weights.pickled import PickledFile, PickledSlice
from rayllm.weights.progress import LoadProgress
from rayllm.weights.safetensors_file import MappedSlice, SafetensorsFile


class Checkpoint:
    """The tensors of a folder's safetensors files, or where it has none, of its PyTorch files; read slice by slice,
    files are mapped, not loaded. `load_format`: "safetensors" and "pt" name one of the two.

    Which files those are, `weights.files` says. Several threads may read at once; `progress` counts the bytes.
    """

    def __init__(self, folder: str | Path, load_format: str = "auto", progress: LoadProgress | None = None):
        self.folder = Path(folder)
        self.progress = progress or LoadProgress()
        self._lock = threading.Lock()
        self._used: set[str] = set()
        if not self.folder.is_dir():
            raise ConfigError(f"model folder {str(folder)!r} does not exist")
        self._files: dict[str, Path] = {}
        self._open: dict[Path, SafetensorsFile | PickledFile] = {}
        self._form = self._choose_form(load_format)
        index = self._form.index_file(self.folder)
        if index is not None:
            self._read_index(index)
        else:
            self._read_all()
        self.progress.begin(sum(self._slice(name).num_bytes for name in self._files))

    def _choose_form(self, load_format: str) -> WeightForm:
        has_safetensors = bool(index_file(self.folder) or safetensors_files(self.folder))
        is_pickled = load_format == "pt" or (load_format == "auto" and not has_safetensors)
        if is_pickled and PICKLED.is_in(self.folder):
            return PICKLED
        if load_format == "pt":
            raise ConfigError(f"{self.folder} contains no {PICKLED.whole}, which load_format='pt' (or 'bin') requires")
        return SAFETENSORS

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def bytes_read(self) -> int:
        return self.progress.bytes_read

    def names(self) -> list[str]:
        return list(self._files)

    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`; `ConfigError` if none does."""
        stored = self._stored(name)
        if stored not in self._files:
            near = did_you_mean(name, self._files)
            raise ConfigError(f"{self.folder}: the checkpoint has no tensor {name!r}{near}")
        return self._files[stored]

    def _stored(self, name: str) -> str:
        """The name in the file: one of the bare model, without a head, leaves the first part out (`model.`,
        `transformer.`), as those of facebook/opt-125m and openai-community/gpt2."""
        bare = name.partition(".")[2]
        return bare if name not in self._files and bare in self._files else name

    def shape_of(self, name: str) -> tuple[int, ...]:
        """`ConfigError` where there is no tensor `name`."""
        return tuple(self._slice(name).get_shape())

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """`ConfigError` where there is no tensor `name` of this shape. It counts as used from then on."""
        view = self._slice(name)
        with self._lock:
            is_new = self._stored(name) not in self._used
            self._used.add(self._stored(name))
        if is_new:
            self.progress.see(view.num_bytes)
        found = view.get_shape()
        if list(found) != list(shape):
            raise ConfigError(
                f"{self.file_of(name)}: tensor {name!r} has shape {list(found)}, but config.json requires {list(shape)}"
            )

    def unused(self) -> list[str]:
        """Tensors that were not read, sorted."""
        return sorted(name for name in self._files if name not in self._used)

    def read(self, name: str, region: Sequence[range]) -> Tensor:
        """The given range of each dimension of tensor `name`, in the checkpoint's own dtype. It may be memory of the
        mapped file: it is not to be changed in place."""
        view = self._slice(name)
        try:
            tensor = view[tuple(slice(part.start, part.stop) for part in region)]
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{self.file_of(name)}: tensor {name!r} cannot be read: {_one_line(error)}") from None
        self.progress.read(tensor.nbytes)
        return tensor

    def _slice(self, name: str) -> MappedSlice | PickledSlice:
        return self._open[self.file_of(name)].get_slice(self._stored(name))

    def _read_index(self, index: Path) -> None:
        self._files = self._form.weight_map(index)
        for path in dict.fromkeys(self._files.values()):
            self._open_file(path)
        for name, path in self._files.items():
            if name not in self._open[path].keys():  # noqa: SIM118 (not a dict)
                raise ConfigError(f"{index}: {path.name} holds no tensor {name!r}")

    def _read_all(self) -> None:
        paths = PICKLED.files(self.folder) if self._form is PICKLED else safetensors_files(self.folder)
        if not paths:
            if self._form is SAFETENSORS and PICKLED.is_in(self.folder):
                raise ConfigError(
                    f"{self.folder} contains no safetensors files, which load_format='safetensors' requires: with "
                    f"load_format='auto' its {PICKLED.whole} is read"
                )
            others = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]
            why = f"; {min(others)} is not a file name that is read" if others else ""
            raise ConfigError(f"{self.folder} contains neither model.safetensors nor pytorch_model.bin{why}")
        for path in paths:
            for name in self._open_file(path).keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise ConfigError(f"tensor {name!r} is both in {self._files[name]} and in {path.name}")
                self._files[name] = path

    def _open_file(self, path: Path) -> SafetensorsFile | PickledFile:
        check_regular_file(path)
        self._open[path] = PickledFile(path) if self._form is PICKLED else SafetensorsFile(path)
        return self._open[path]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
