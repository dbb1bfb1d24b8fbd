"""Models from the Hugging Face hub, in its own cache, which they share with `transformers`."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError, HubUnreachableError, RayLLMError
from rayllm.weights.hub_model import HubModel, OnProgress, RemoteFile, needed_files

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def local_folder(model: HubModel) -> Path | None:
    """The snapshot in the cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model.name, revision=model.revision, cache_dir=model.download_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return Path(found)


def download(model: HubModel, on_progress: OnProgress) -> Path:
    """As `hub.download`."""
    from huggingface_hub import HfApi, hf_hub_download

    with _translated(model):
        found = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
        files = needed_files(model, [RemoteFile(file.rfilename, file.size or 0) for file in found.siblings or []])
        counter = _Counter(sum(file.num_bytes for file in files), on_progress)
        for file in sorted(files, key=lambda file: file.num_bytes):
            with counter.counting(file):
                path = hf_hub_download(
                    model.name,
                    file.path,
                    revision=model.revision,
                    cache_dir=model.download_dir,
                    tqdm_class=counter.bar_class(),
                )
    return Path(path).parent


def download_config(model: HubModel) -> Path:
    """The folder of the model's config.json, downloaded alone. Raises as `hub.download`."""
    from huggingface_hub import hf_hub_download

    with _translated(model):
        path = hf_hub_download(model.name, "config.json", revision=model.revision, cache_dir=model.download_dir)
    return Path(path).parent


class _Counter:
    """Sums up what the hub's library tells the progress bar of each file."""

    def __init__(self, num_bytes: int, on_progress: OnProgress):
        self._total = num_bytes
        self._on_progress = on_progress
        self._done = 0
        self._of_file = 0

    @contextlib.contextmanager
    def counting(self, file: RemoteFile) -> Iterator[None]:
        self._of_file = 0
        yield
        self._done, self._of_file = self._done + file.num_bytes, 0
        self._report()

    def add(self, num_bytes: float) -> None:
        self._of_file += int(num_bytes)
        self._report()

    def _report(self) -> None:
        self._on_progress(min(self._done + self._of_file, self._total), self._total)

    def bar_class(self) -> Any:
        """A progress bar that shows nothing and adds to this counter."""
        from tqdm import tqdm

        counter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **settings: Any):
                settings.pop("name", None)
                super().__init__(*args, **{**settings, "disable": True})
                counter.add(settings.get("initial") or 0)

            def update(self, n: float | None = 1) -> None:
                counter.add(n or 0)

        return Bar


@contextlib.contextmanager
def _translated(model: HubModel) -> Iterator[None]:
    """Each way in which the hub fails, as one line with the fix."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            f"{model.name} asks for its licence to be accepted: do so at https://huggingface.co/{model.name}, "
            "then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{model.name!r} is no folder here, and no model at the Hugging Face hub (or a private one): check it, "
            "or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{model.name} has no revision {model.revision!r}: give a branch, tag or commit") from None
    except errors.OfflineModeIsEnabled:
        raise HubUnreachableError(
            f"{model.name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub: unset it"
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{model.name!r} is no model's name: {error}") from None
    except RayLLMError:
        raise
    except Exception as error:  # of whichever HTTP library the hub's own has chosen
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise ConfigError(f"{model.name} cannot be written ({error}): give a --download-dir with room") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubUnreachableError(
            f"the Hugging Face hub does not answer for {model.name} ({reason}): check the network, set HF_ENDPOINT for "
            "a mirror, or give a folder; what came is kept"
        ) from None
