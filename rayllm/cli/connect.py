"""What `chat` and `complete` share: which server to ask, and how to sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import Parser, UsageError, flag_name
from rayllm.config import Environment
from rayllm.errors import EngineUnreachableError

if TYPE_CHECKING:
    from rayllm.cli.client import ApiClient

DEFAULT_URL = "http://127.0.0.1:8000"
_PORTS = range(1, 2**16)

PARAMS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy; default: the model's"),
    "top_p": (float, "share of probability to draw from"),
    "top_k": (int, "number of tokens to draw from; 0: all"),
    "min_p": (float, "least probability, as a share of the likeliest token's"),
    "max_tokens": (int, "tokens to answer with, at most"),
    "seed": (int, "the same seed gives the same answer"),
    "repetition_penalty": (float, "above 1: fewer repetitions"),
    "presence_penalty": (float, "above 0: more new words"),
    "frequency_penalty": (float, "above 0: fewer frequent words"),
}


def add_server_flags(parser: Parser) -> None:
    text = f"server to ask, by its URL, port, name or pid (default: the one that runs here, else {DEFAULT_URL})"
    parser.add_argument("--url", help=text)
    parser.add_argument("--api-key", help="key to send (default: RLLM_API_KEY)")
    parser.add_argument("--served-model-name", metavar="NAME", help="model to ask (default: the server's first)")


def add_param_flags(parser: Parser) -> None:
    for name, (kind, text) in PARAMS.items():
        parser.add_argument(flag_name(name), type=kind, metavar=kind.__name__.upper(), help=text)


def param_name(word: str) -> str:
    """A sampling parameter as the API calls it; `UsageError` for what is none."""
    from rayllm.errors import did_you_mean

    name = word.replace("-", "_")
    if name not in PARAMS:
        raise UsageError(f"unknown parameter {name!r}{did_you_mean(name, PARAMS)}")
    return name


def parse_param(name: str, text: str) -> float | int:
    """The value of a sampling parameter; `UsageError` for what is none or is out of its range."""
    kind = PARAMS[name][0]
    try:
        value: float | int = kind(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} must be {'an integer' if kind is int else 'a number'}") from None
    return checked_param(name, value)


def checked_param(name: str, value: Any) -> Any:
    """The value, where it is in the parameter's range; `UsageError` with that range where it is not."""
    from rayllm.request import SamplingParams

    try:
        SamplingParams(**{name: value})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    return value


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters among the flags. `UsageError` for one that is out of its range."""
    return {name: checked_param(name, given[name]) for name in PARAMS if name in given}


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
        raise UsageError(f"{len(urls)} servers run, say which by its name: {shown_list(entries)}")
    return DEFAULT_URL


def http_settings(url: str) -> dict[str, Any]:
    """Settings of an httpx client for `url`: proxies of the environment do not know this machine's loopback."""
    host = url.rpartition("://")[2].partition("/")[0]
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    return {"trust_env": not (name in ("localhost", "::1", "0.0.0.0", "::") or name.startswith("127."))}


@contextlib.contextmanager
def connected(given: Mapping[str, Any]) -> Iterator[ApiClient]:
    """A client of the server that the flags name. Whether it answers shows at the first request."""
    from rayllm.cli.client import ApiClient

    client = ApiClient(server_url(given.get("url")), given.get("api_key") or Environment.api_key())
    try:
        yield client
    finally:
        client.close()
