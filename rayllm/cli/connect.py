"""What `chat` and `complete` share: which server to ask, and how to sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import Parser, UsageError, flag_name
from rayllm.config import Environment

if TYPE_CHECKING:
    from rayllm.cli.client import ApiClient

DEFAULT_URL = "http://127.0.0.1:8000"

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
    parser.add_argument("--url", help=f"server to ask (default: the one that runs here, else {DEFAULT_URL})")
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


def default_url() -> str:
    """The address of the server that runs on this machine; the usual one, where there are none or one of several has
    it. `UsageError` where several run elsewhere."""
    from rayllm.machine.registry import running

    urls = [entry.url for entry in running()]
    if len(urls) == 1:
        return urls[0]
    if urls and DEFAULT_URL not in urls:
        raise UsageError(f"{len(urls)} servers run, say which by its address: {', '.join(urls)}")
    return DEFAULT_URL


@contextlib.contextmanager
def connected(given: Mapping[str, Any]) -> Iterator[ApiClient]:
    """A client of the server that the flags name. Whether it answers shows at the first request."""
    from rayllm.cli.client import ApiClient

    client = ApiClient(given.get("url") or default_url(), given.get("api_key") or Environment.api_key())
    try:
        yield client
    finally:
        client.close()
