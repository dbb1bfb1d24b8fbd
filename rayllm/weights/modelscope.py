"""Models from ModelScope, by its HTTP API; each in a folder of its own."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rayllm.config import Environment
from rayllm.errors import ConfigError, HubUnreachableError
from rayllm.weights.hub_model import HubModel, OnProgress, RemoteFile, needed_files, no_progress

_REVISION = "master"
_CHUNK_BYTES = 2**20
_TIMEOUT_S = 30.0
_NUM_TRIES = 5


def local_folder(model: HubModel) -> Path | None:
    folder = _folder(model)
    return folder if folder.is_dir() else None


def download(model: HubModel, on_progress: OnProgress) -> Path:
    """As `hub.download`. A file gets its name when it is whole and its checksum is right."""
    return _download(model, needed_files, on_progress)


def download_config(model: HubModel) -> Path:
    """The folder of the model's config.json, downloaded alone. Raises as `hub.download`."""
    return _download(model, lambda model, files: [file for file in files if file.path == "config.json"], no_progress)


def _download(
    model: HubModel, choose: Callable[[HubModel, list[RemoteFile]], Sequence[RemoteFile]], on_progress: OnProgress
) -> Path:
    import httpx

    folder = _folder(model)
    with _translated(model), httpx.Client(base_url=_api(model), timeout=_TIMEOUT_S, follow_redirects=True) as http:
        files = choose(model, _list_files(http, model))
        total, done = sum(file.num_bytes for file in files), 0
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = folder / file.path
            if not path.is_file() or path.stat().st_size != file.num_bytes:
                _fetch(http, model, file, path, lambda here, before=done: on_progress(before + here, total))
            done += file.num_bytes
            on_progress(done, total)
    return folder


def _folder(model: HubModel) -> Path:
    base = Path(model.download_dir or Path.home() / ".cache" / "rayllm" / "models").expanduser()
    return base / "modelscope" / model.name.replace("/", "--") / (model.revision or _REVISION).replace("/", "--")


def _api(model: HubModel) -> str:
    return f"{Environment.modelscope_endpoint()}/api/v1/models/{model.name}"


def _list_files(http: Any, model: HubModel) -> list[RemoteFile]:
    answer = http.get("/repo/files", params={"Revision": model.revision or _REVISION, "Recursive": "true"})
    if answer.status_code in (401, 403, 404):
        raise ConfigError(f"ModelScope has no model {model}, or it is private: check name and revision")
    answer.raise_for_status()
    files = answer.json()["Data"]["Files"]
    return [RemoteFile(f["Path"], int(f["Size"]), f.get("Sha256") or "") for f in files if f["Type"] == "blob"]


def _fetch(http: Any, model: HubModel, file: RemoteFile, path: Path, on_bytes: Any) -> None:
    """Downloads one file; a connection that breaks is taken up where it broke."""
    import httpx

    unfinished = path.with_name(path.name + ".part")
    for tries_left in reversed(range(_NUM_TRIES)):
        try:
            _append(http, model, file, unfinished, on_bytes)
            break
        except httpx.TransportError:
            if not tries_left:
                raise
    if unfinished.stat().st_size != file.num_bytes or (file.sha256 and _sha256(unfinished) != file.sha256):
        unfinished.unlink()
        raise HubUnreachableError(
            f"{file.path} of {model} is corrupt: its size or SHA-256 is not what ModelScope says. Pull the model again"
        )
    unfinished.replace(path)


def _append(http: Any, model: HubModel, file: RemoteFile, unfinished: Path, on_bytes: Any) -> None:
    here = unfinished.stat().st_size if unfinished.exists() else 0
    if here >= file.num_bytes and unfinished.exists():
        return
    params = {"Revision": model.revision or _REVISION, "FilePath": file.path}
    headers = {"range": f"bytes={here}-"} if here else {}
    with http.stream("GET", "/repo", params=params, headers=headers) as answer:
        answer.raise_for_status()
        if answer.status_code != 206:  # the whole file comes, whatever was asked for
            here = 0
        with unfinished.open("r+b" if here else "wb") as out:
            out.seek(here)
            out.truncate()
            for chunk in answer.iter_raw():
                out.write(chunk)
                here += len(chunk)
                on_bytes(here)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _translated(model: HubModel) -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise HubUnreachableError(
            f"ModelScope does not answer for {model.name} ({reason}): check the network, or give a folder; "
            "what came is kept"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise HubUnreachableError(f"ModelScope answers for {model.name} in a way not understood: {error!r}") from None
    except OSError as error:
        raise ConfigError(f"{model.name} cannot be written ({error}): give a --download-dir with room") from None
