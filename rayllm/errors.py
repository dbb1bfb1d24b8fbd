"""Every error a user can meet. Each message names the value, the limit and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

STRUCTURED_OUTPUTS_FAILED = "structured_outputs_failed"
"""Code of the error that ends a choice whose grammar could not be followed any further."""
NO_TOKEN_LEFT = "no_token_left"
"""Code of the error that ends a choice which its bad words, with its other limits, leave nothing to write."""


class RayLLMError(Exception):
    """The root of RayLLM's own errors."""


class ConfigError(RayLLMError, ValueError):
    """A setting, a model folder or a flag that cannot be served; raised before anything is started."""


class NoRoomError(ConfigError):
    """The Ray cluster has no room for an engine now. Once others stop, or a node joins, it may have."""


class RequestError(RayLLMError, ValueError):
    """A request that cannot be served as it is: the client's fault, and the client can fix it.

    `param` is the field at fault, `code` a machine-readable word (OpenAI's error envelope), `status` the HTTP status.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class ContextLengthError(RequestError):
    """The prompt, or prompt plus `max_tokens`, is longer than the model's context."""

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message, param=param, code="context_length_exceeded")


class OverloadedError(RayLLMError):
    """The engine refuses new work for now; `retry_after_s` says when to come back, `limit` what was met."""

    def __init__(self, message: str, retry_after_s: float, limit: str = ""):
        super().__init__(message, retry_after_s, limit)  # all arguments: Ray pickles errors by them
        self.message = message
        self.retry_after_s = retry_after_s
        self.limit = limit

    def __str__(self) -> str:
        return self.message


class EngineError(RayLLMError):
    """The engine failed while a request was open; `code` is a machine-readable word."""

    def __init__(self, message: str, *, code: str = "engine_error"):
        super().__init__(message)
        self.code = code


class WorkerDiedError(EngineError):
    """A worker is gone or fails; `rank` names it and `reason` says what was seen."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"worker rank {rank} failed: {reason}", code="worker_died")
        self.args = (rank, reason)  # Ray pickles errors by their arguments
        self.rank = rank
        self.reason = reason

    def __str__(self) -> str:
        return f"worker rank {self.rank} failed: {self.reason}"


class NodeLostError(EngineError):
    """A node of the Ray cluster that an engine's process is on does not answer; elsewhere it may run."""

    def __init__(self, message: str):
        super().__init__(message, code="node_lost")


class EngineUnreachableError(RayLLMError):
    """No engine answers at the name or address that was asked for."""


class HubUnreachableError(RayLLMError):
    """A model is not on this machine, and the hub that has it does not answer."""


_SEGMENT = r"[/\\][^\s/\\'\":,;()<>]+"
_FILE_PATH = re.compile(rf"(?<![\w:/.])(?:(?:[A-Za-z]:|~|\.{{1,2}})(?:{_SEGMENT})+|(?:{_SEGMENT}){{2,}})[/\\]?")


def without_paths(text: str) -> str:
    """The text with each file path cut down to its last name, for those who need not know how the server's disk
    looks."""
    return _FILE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


_NEAR = 0.75
"""Share of letters that two words have in common, in order, from which one may be meant by the other."""
_LEAST_PREFIX = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'x'?`, or nothing where no known word is near: spelt almost alike,
    or the only one that begins so."""
    names = list(dict.fromkeys(known))
    by_lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(word.lower(), list(by_lowered), n=1, cutoff=_NEAR)
    if not near and len(word) >= _LEAST_PREFIX:
        beginning = [name for name in by_lowered if name.startswith(word.lower())]
        near = beginning if len(beginning) == 1 else []
    return f"; did you mean {by_lowered[near[0]]!r}?" if near else ""


def shorten(value: Any, limit: int = 80) -> str:
    """A value as it was sent, for a message, however large it is."""
    if isinstance(value, (list, dict, str)) and len(value) > limit:
        if isinstance(value, str):
            return f"{value[:limit]!r}..."
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
