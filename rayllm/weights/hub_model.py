"""A model's name at a hub, and which of the files there serving needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rayllm.config import EngineConfig, Environment
from rayllm.errors import ConfigError
from rayllm.weights.files import PICKLED, SAFETENSORS
from rayllm.weights.tokenizer_names import has_vocabulary_files

MODELSCOPE_PREFIX = "ms:"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")

OnProgress = Callable[[int, int], None]
"""Called with the bytes that have been downloaded and the bytes of all files."""


def no_progress(done: int, total: int) -> None:
    """An `OnProgress` that reports nothing."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model at its hub; `sha256` where the hub gives one."""

    path: str
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class HubModel:
    """A model's name at a hub, its revision, and the folder that downloads go to."""

    name: str
    is_modelscope: bool = False
    revision: str | None = None
    download_dir: str | None = None
    needs_tokenizer: bool = True
    """Whether it is complete only with a tokenizer of its own."""

    @classmethod
    def of(cls, config: EngineConfig) -> HubModel | None:
        """The model of an engine; None where that is a folder."""
        model = cls.parse(config.model, revision=config.revision, download_dir=config.download_dir)
        has_other = config.tokenizer is not None or config.skip_tokenizer_init
        return replace(model, needs_tokenizer=False) if model is not None and has_other else model

    @classmethod
    def parse(cls, text: str, *, revision: str | None = None, download_dir: str | None = None) -> HubModel | None:
        """None for a local folder and what is no name at a hub (`owner/model`, or `ms:owner/model` for ModelScope)."""
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
