"""Folders that a process needs, where any of them may be missing, full or not writable."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from rayllm.config import Environment
from rayllm.errors import ConfigError


def home_folder() -> Path | None:
    """The user's home folder; None for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def check_working_folder() -> None:
    """`ConfigError` where this process's working folder was deleted, or may not be entered any more: neither Ray nor a
    relative path would work in it."""
    try:
        os.listdir(os.getcwd())
    except PermissionError:
        return  # of use for what is named in it
    except OSError as error:
        reason = "was deleted" if isinstance(error, FileNotFoundError) else f"cannot be used ({error.strerror})"
        raise ConfigError(f"the working folder of this process {reason}: change to a folder that exists") from None


def log_folder() -> Path:
    """Where logs are kept: RLLM_LOG_DIR, or the user's cache folder, or one for temporary files where that cannot be
    written. It need not be there."""
    given = Environment.log_dir()
    if given:
        return Path(given).expanduser()
    home = home_folder()
    usual = None if home is None else home / ".cache" / "rayllm" / "logs"
    if usual is not None and _can_hold(usual):
        return usual
    return Path(temporary_folders()[-1]) / f"rayllm-{os.getuid()}-logs"


def temporary_folders() -> list[str]:
    """`/tmp`, which every process of this machine knows, and the one that this process was told of (`TMPDIR`) where
    that is another and can be written."""
    folders = ["/tmp"]
    with contextlib.suppress(FileNotFoundError):  # none can be written
        folders.append(tempfile.gettempdir())
    return list(dict.fromkeys(folders))


def make_private(folder: Path) -> None:
    """Makes the folder, and those above it, where they are missing. `OSError` where that is not possible, or where it
    is another user's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.lstat().st_uid not in (os.getuid(), 0):
        raise PermissionError(1, "it is another user's")


def _can_hold(folder: Path) -> bool:
    """Whether files may be written to the folder; it is made for that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder)
    except OSError:
        return False
    os.close(descriptor)
    os.unlink(path)
    return True
