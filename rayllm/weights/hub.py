"""Models by name: which of them are on this machine, and how to bring one here, from Hugging Face or ModelScope."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rayllm.config import EngineConfig, Environment
from rayllm.errors import ConfigError
from rayllm.weights.files import PICKLED, SAFETENSORS, holds_weights, index_file, safetensors_files
from rayllm.weights.tokenizer_names import has_vocabulary_files

MODELSCOPE_PREFIX = "ms:"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")

OnProgress = Callable[[int, int], None]
"""Told bytes that are here, and bytes in all."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model at its hub; `sha256` where the hub tells it."""

    path: str
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class HubModel:
    """A model's name at a hub, which revision is meant, and where it is to lie."""

    name: str
    is_modelscope: bool = False
    revision: str | None = None
    download_dir: str | None = None
    needs_tokenizer: bool = True
    """Whether it is whole only with a tokenizer of its own."""

    @classmethod
    def of(cls, config: EngineConfig) -> HubModel | None:
        """The model of an engine; None where that is a folder."""
        model = cls.parse(config.model, revision=config.revision, download_dir=config.download_dir)
        has_other = config.tokenizer is not None or config.skip_tokenizer_init
        return replace(model, needs_tokenizer=False) if model is not None and has_other else model

    @classmethod
    def parse(cls, text: str, *, revision: str | None = None, download_dir: str | None = None) -> HubModel | None:
        """None for what is no hub's name (`owner/model`, or `ms:owner/model` for ModelScope), or is a folder here."""
        is_modelscope = text.startswith(MODELSCOPE_PREFIX)
        name = text.removeprefix(MODELSCOPE_PREFIX)
        if not _NAME.fullmatch(name) or (not is_modelscope and Path(text).expanduser().exists()):
            return None
        return cls(name, is_modelscope or Environment.use_modelscope(), revision, download_dir)

    def __str__(self) -> str:
        return self.name + (f" at revision {self.revision}" if self.revision else "")

    @property
    def pull_command(self) -> str:
        flags = [f" --revision {self.revision}"] if self.revision else []
        flags += [f" --download-dir {self.download_dir}"] if self.download_dir else []
        return f"rayllm pull {MODELSCOPE_PREFIX if self.is_modelscope else ''}{self.name}{''.join(flags)}"

    def folder(self) -> Path | None:
        """Where it lies on this machine, whole; None where it does not."""
        if self.is_modelscope:
            from rayllm.weights.modelscope import local_folder
        else:
            from rayllm.weights.huggingface import local_folder
        folder = local_folder(self)
        return folder if folder is not None and _is_whole(folder, self.needs_tokenizer) else None

    def download(self, on_progress: OnProgress = lambda done, total: None) -> Path:
        """Brings here what an earlier download has not, and returns its folder. (From Hugging Face, a file that was
        begun begins again; from ModelScope it goes on where it stopped.)

        Raises `ConfigError` for a name that the hub does not have or that cannot be served, and
        `HubUnreachableError` where no hub answers.
        """
        if self.is_modelscope:
            from rayllm.weights.modelscope import download
        else:
            from rayllm.weights.huggingface import download
        return download(self, on_progress)


def needed_files(model: HubModel, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """What serving needs of a model: safetensors (once), tokenizer, configs. `ConfigError` without weights or, where it
    needs one, a tokenizer."""
    top = [file for file in files if len(PurePosixPath(file.path).parts) == 1]
    texts = [file for file in top if file.path.endswith(_TEXT_SUFFIXES)]
    weights = [file for file in top if file.path.endswith(".safetensors")]
    shards = [file for file in weights if SAFETENSORS.shard.fullmatch(file.path)]
    whole = [file for file in weights if file.path == "model.safetensors"]
    others = [file for file in weights if not file.path.startswith(("consolidated", "adapter_"))]
    pickled = [file for file in top if file.path == PICKLED.whole or PICKLED.shard.fullmatch(file.path)]
    pickled = [file for file in pickled if file.path == PICKLED.whole] or pickled
    chosen = shards or whole or others or pickled
    if not chosen:
        raise ConfigError(
            f"{model} has neither safetensors files nor pytorch_model.bin: RayLLM reads no other weights; choose "
            "another repository"
        )
    if model.needs_tokenizer and not has_vocabulary_files(file.path for file in texts):
        raise ConfigError(
            f"{model} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt): give "
            "--tokenizer FOLDER, or --skip-tokenizer-init to work with token ids"
        )
    return [*texts, *chosen]


def local_model(config: EngineConfig) -> Path | None:
    """The folder of a model that is named by its hub's name and is on this machine; None for a name of another kind.

    Raises `ConfigError`, which says how to get it, where it is not here.
    """
    model = HubModel.of(config)
    if model is None:
        return None
    folder = model.folder()
    if folder is None:
        raise ConfigError(
            f"model {config.model!r} is no folder here and not downloaded: '{model.pull_command}' brings it here"
        )
    return folder


def ensure_downloaded(config: EngineConfig, on_progress: OnProgress = lambda done, total: None) -> None:
    """Downloads the config's model where it is a hub's and not on this machine. Raises as `HubModel.download`."""
    model = HubModel.of(config)
    if model is not None and model.folder() is None:
        model.download(on_progress)


def _is_whole(folder: Path, needs_tokenizer: bool) -> bool:
    """Whether configuration, tokenizer and all weights are there: a download may have stopped half way, or another
    program may have brought only what it needed."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if "config.json" not in names or (needs_tokenizer and not has_vocabulary_files(names)):
        return False
    index = index_file(folder)
    if index is None and not safetensors_files(folder):
        index = PICKLED.index_file(folder)
    if index is None:
        return holds_weights(folder)
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # whoever loads it says what is wrong with it
    return all((folder / str(name)).is_file() for name in files)
