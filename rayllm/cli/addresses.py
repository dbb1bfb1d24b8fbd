"""The address of the server that a word on the command line names."""

from __future__ import annotations

from typing import Any

from rayllm.cli.flags import UsageError
from rayllm.errors import EngineUnreachableError

DEFAULT_URL = "http://127.0.0.1:8000"
_PORTS = range(1, 2**16)


def server_url(word: str | None) -> str:
    """The address of the server that a URL, `HOST:PORT`, port, name, pid or model names; without a word, of the one
    that runs on this machine. `EngineUnreachableError` where the word names none."""
    from rayllm.machine.registry import find

    if not word:
        return default_url()
    if "://" in word:
        return word.rstrip("/").removesuffix("/v1")
    try:
        return find(word).url
    except EngineUnreachableError:
        if word.isdigit() and int(word) in _PORTS:  # a server that another user, or Serve itself, started
            return f"http://127.0.0.1:{word}"
        host, _, port = word.removesuffix("/v1").rpartition(":")
        if host and port.isdigit():
            return f"http://{host}:{port}"
        raise


def default_url() -> str:
    """The address of the server that runs on this machine; the usual one, where there are none or one of several has
    it. `UsageError` where several run elsewhere."""
    from rayllm.machine.registry import running, shown_list

    entries = running()
    urls = [entry.url for entry in entries]
    if len(urls) == 1:
        return urls[0]
    if urls and DEFAULT_URL not in urls:
        raise UsageError(f"{len(urls)} servers are running, name one of them: {shown_list(entries)}")
    return DEFAULT_URL


def http_settings(url: str) -> dict[str, Any]:
    """Settings of an httpx client for `url`: proxies of the environment do not know this machine's loopback."""
    host = url.rpartition("://")[2].partition("/")[0]
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    return {"trust_env": not (name in ("localhost", "::1", "0.0.0.0", "::") or name.startswith("127."))}
