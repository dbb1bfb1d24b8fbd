"""`RemoteOpenAIServer`, as vLLM's tests know it, for `rayllm serve` with a model that stands in for theirs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from served_process import ServedProcess, running_serve

_WITH_VALUE = frozenset(
    {
        "--max-model-len",
        "--max-num-seqs",
        "--max-logprobs",
        "--max-num-batched-tokens",
        "--tool-call-parser",
        "--reasoning-parser",
        "--chat-template-content-format",
    }
)
_SWITCHES = frozenset(
    {
        "--enable-per-request-metrics",
        "--enable-tokenizer-info-endpoint",
        "--enable-force-include-usage",
        "--return-tokens-as-token-ids",
        "--enable-auto-tool-choice",
        "--no-enable-prefix-caching",
        "--enable-prefix-caching",
    }
)
_OF_THE_DEVICE = frozenset(
    {"--dtype", "--gpu-memory-utilization", "--port", "--structured-outputs-config.backend", "--seed", "--load-format"}
)
"""With a value: the stand-in has its own, or there is one way only."""
_ALWAYS_ON = frozenset(
    {"--enforce-eager", "--enable-prompt-tokens-details", "--enable-server-load-tracking", "--enable-chunked-prefill"}
)
_OF_LORA = frozenset({"--enable-lora"})
_OF_LORA_WITH_VALUE = frozenset({"--lora-modules", "--max-lora-rank", "--max-cpu-loras"})
"""Left out: the tests that ask for an adapter are not applicable one by one."""

_running: dict[tuple[str, ...], tuple[contextlib.ExitStack, ServedProcess]] = {}


@functools.cache
def checkpoint(thinks: bool = False) -> Path:
    from vllm_tests.stand_in import make_stand_in

    folder = tempfile.TemporaryDirectory(prefix="rlvllm-")
    atexit.register(folder.cleanup)
    return make_stand_in(Path(folder.name), Path(os.environ["CONFORMANCE_CORPUS"]), thinks=thinks)


def translated(args: Sequence[str]) -> list[str]:
    """The flags for `rayllm serve`. Skips the test that needs another."""
    found, names = [], []
    left = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    while left:
        flag = left.pop(0).replace("_", "-")
        if flag == "--served-model-name":
            while left and not left[0].startswith("--"):
                names.append(left.pop(0))
        elif flag in _WITH_VALUE:
            found += [flag, left.pop(0)]
        elif flag in _SWITCHES:
            found.append(flag)
        elif flag in _OF_DROPPED_WITH_VALUE:
            left.pop(0)
        elif flag not in _ALWAYS_ON | _OF_LORA:
            pytest.skip(f"needs a server with {flag}", allow_module_level=True)
    return [*found, *(["--served-model-name", *names] if names else [])]


_OF_DROPPED_WITH_VALUE = _OF_THE_DEVICE | _OF_LORA_WITH_VALUE


def stop_all() -> None:
    while _running:
        _, (stack, _) = _running.popitem()
        stack.close()


def _served(flags: tuple[str, ...]) -> ServedProcess:
    """A server with these flags: the one that runs, or a new one in its place."""
    if flags not in _running:
        stop_all()
        stack = contextlib.ExitStack()
        model = checkpoint(thinks="--reasoning-parser" in flags)
        _running[flags] = stack, stack.enter_context(running_serve(str(model), *flags))
    return _running[flags][1]


class RemoteOpenAIServer:
    """A server for the length of a `with`. `model` is the name under which the stand-in is served."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        *,
        env_dict: Mapping[str, str] | None = None,
        auto_port: bool = True,
        **options: Any,
    ):
        flags = translated(list(vllm_serve_args))
        if "--served-model-name" not in flags:
            flags += ["--served-model-name", model]
        self._process = _served(tuple(flags))

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *args: object) -> None:
        """It runs on for the next file that wants one like it."""

    @property
    def url_root(self) -> str:
        return self._process.url

    def url_for(self, *parts: str) -> str:
        return "/".join((self.url_root, *parts))

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._options("/v1", options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._options("/v1", options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**self._options("", options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**self._options("", options))

    def _options(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        own = {"base_url": self.url_root + path, "api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 600}
        return {**own, **options}
