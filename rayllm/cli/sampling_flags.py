"""The sampling parameters that `chat`, `run` and `complete` take as flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.cli.flags import Parser, UsageError, flag_name

PARAMS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy; default: the model's"),
    "top_p": (float, "cumulative probability of the tokens to sample from"),
    "top_k": (int, "number of most likely tokens to sample from; 0: all"),
    "min_p": (float, "minimum probability relative to the most likely token"),
    "max_tokens": (int, "maximum number of generated tokens"),
    "seed": (int, "random seed; the same seed gives the same response"),
    "repetition_penalty": (float, "above 1: fewer repetitions"),
    "presence_penalty": (float, "above 0: more new words"),
    "frequency_penalty": (float, "above 0: fewer frequent words"),
}


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
