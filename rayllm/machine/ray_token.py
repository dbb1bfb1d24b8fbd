"""The token by which Ray's processes know each other: where it is, and where it is made."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from rayllm.config import Environment
from rayllm.errors import ConfigError
from rayllm.machine.folders import home_folder


def token_file() -> Path | None:
    """The file in which Ray looks for its token. None where the user has no home folder."""
    given = Environment.ray_token_path()
    if given:
        return Path(given)
    home = home_folder()
    return None if home is None else home / ".ray" / "auth_token"


def read_ray_token() -> str:
    """The token that Ray uses in this process; empty where there is none."""
    token = Environment.ray_token()
    path = token_file()
    if token or path is None:
        return token
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def ensure_ray_token() -> None:
    """Where no token is given, makes one in its usual file, readable by its owner alone. Where that file cannot be
    written or Ray would not find it, the token is handed down in the environment (`RAY_AUTH_TOKEN`) instead.

    Raises `ConfigError` where `RAY_AUTH_TOKEN_PATH` names a file without a token.
    """
    if Environment.ray_token():
        return
    path = token_file()
    if Environment.ray_token_path():
        if not read_ray_token():
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH={str(path)!r} is not a file with a token: write one, or unset the variable"
            )
        return
    if path is None or not _made(path):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif not Environment.has_home():  # Ray looks there alone
        os.environ["RAY_AUTH_TOKEN"] = read_ray_token()


def _made(path: Path) -> bool:
    """Whether the file holds a token: one that was there, or a new one."""
    if read_ray_token():
        with contextlib.suppress(OSError):
            path.chmod(0o600)
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    except OSError:
        return False
    try:
        os.link(unfinished, path)
    except FileExistsError:  # another process was first: its token serves us too
        return bool(read_ray_token())
    except OSError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    return True
