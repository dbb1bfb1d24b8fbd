"""Models by name: which of them are downloaded, and how to download one, from Hugging Face or ModelScope."""

from __future__ import annotations

import json
from pathlib import Path

from rayllm.config import EngineConfig
from rayllm.errors import ConfigError
from rayllm.weights import huggingface, modelscope
from rayllm.weights.files import PICKLED, holds_weights, index_file, safetensors_files
from rayllm.weights.hub_model import HubModel, OnProgress, no_progress
from rayllm.weights.tokenizer_names import has_vocabulary_files


def downloaded_folder(model: HubModel) -> Path | None:
    """The folder of a model that is on this machine, complete; None for one that is not."""
    folder = (modelscope if model.is_modelscope else huggingface).local_folder(model)
    return folder if folder is not None and _is_complete(folder, model.needs_tokenizer) else None


def download(model: HubModel, on_progress: OnProgress = no_progress) -> Path:
    """Downloads the files that an earlier download did not complete, and returns the model's folder. A partial file
    from Hugging Face is downloaded again; one from ModelScope is resumed.

    Raises `ConfigError` for a name that the hub does not have or a model that cannot be served, and
    `HubUnreachableError` where the hub does not respond.
    """
    return (modelscope if model.is_modelscope else huggingface).download(model, on_progress)


def local_model(config: EngineConfig) -> Path | None:
    """The folder of a downloaded model that is named by its hub's name; None for a model that is a folder.

    Raises `ConfigError`, with the command that downloads it, where it is not downloaded.
    """
    model = HubModel.of(config)
    if model is None:
        return None
    folder = downloaded_folder(model)
    if folder is None:
        raise ConfigError(
            f"model {config.model!r} is neither a local folder nor downloaded: run '{model.pull_command}'"
        )
    return folder


def ensure_downloaded(config: EngineConfig, on_progress: OnProgress = no_progress) -> None:
    """Downloads the config's model where that is a name at a hub and is not downloaded yet. Raises as `download`."""
    model = HubModel.of(config)
    if model is not None and downloaded_folder(model) is None:
        download(model, on_progress)


def config_folder(config: EngineConfig) -> Path | None:
    """The folder with the config.json of a model that is named by its hub's name; where the model is not downloaded,
    that one file is. None for a model that is a folder. Raises as `download`."""
    model = HubModel.of(config)
    if model is None:
        return None
    return downloaded_folder(model) or (modelscope if model.is_modelscope else huggingface).download_config(model)


def _is_complete(folder: Path, needs_tokenizer: bool) -> bool:
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
