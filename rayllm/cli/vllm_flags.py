"""Flags of vLLM's servers that are no settings of RayLLM: accepted, mapped, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rayllm.cli.flags import UsageError

_ON_RAY = "RayLLM always serves on Ray"
_LOGS = "see --log-file and --log-format"
_NO_GRAPHS = "RayLLM captures no CUDA graphs"
_ALWAYS = "this is always so"
_TLS = "this server speaks plain HTTP: put a proxy that speaks TLS before it"

_WITHOUT_VALUE = {
    "--disable-log-requests": _LOGS,
    "--enable-log-requests": _LOGS,
    "--no-enable-log-requests": _LOGS,
    "--disable-uvicorn-access-log": _LOGS,
    "--disable-frontend-multiprocessing": "see --num-ingress-replicas",
    "--worker-use-ray": _ON_RAY,
    "--engine-use-ray": _ON_RAY,
    "--use-v2-block-manager": _ALWAYS,
    "--async-scheduling": _ALWAYS,
    "--no-async-scheduling": "steps are always planned while the one before runs",
    "--enable-request-id-headers": _ALWAYS,
    "--enable-server-load-tracking": _ALWAYS,
    "--enable-prompt-tokens-details": _ALWAYS,
}
"""Flags without a value that change nothing here, and why."""

_WITH_VALUE = {
    "--uvicorn-log-level": _LOGS,
    "--log-level": _LOGS,
    "--max-log-len": _LOGS,
    "--max-seq-len-to-capture": _NO_GRAPHS,
    "--max-context-len-to-capture": _NO_GRAPHS,
    "--max-parallel-loading-workers": "each rank reads its part of the weights alone",
    "--guided-decoding-backend": "structured outputs are always matched by llguidance",
}
"""Flags with a value that change nothing here, and why."""

_ONE_VALUE = {
    "--response-role": ("assistant", "answers are always the assistant's"),
    "--num-scheduler-steps": ("1", "RayLLM plans one step at a time"),
    "--preemption-mode": ("recompute", "RayLLM computes preempted sequences again"),
    "--tokenizer-pool-size": ("0", "RayLLM tokenizes in the ingress"),
}
"""Flags with the one value that is true here, and why others are refused."""

_REFUSED = {
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--ssl-ca-certs": _TLS,
    "--ssl-cert-reqs": _TLS,
    "--root-path": "this server answers at the root: put a proxy that rewrites paths before it",
    "--middleware": "servers run no code of others: put a proxy before it",
    "--disable-fastapi-docs": "/docs is always served",
    "--rope-scaling": "set rope_scaling in the model's config.json",
    "--rope-theta": "set rope_theta in the model's config.json",
    "--hf-token": "set the environment variable HF_TOKEN",
    "--compilation-config": "RayLLM compiles nothing that could be configured",
    "--kv-transfer-config": "prefill and decoding run in one engine",
    "--enable-expert-parallel": "use --tensor-parallel-size",
    "--tokenizer-revision": "give the tokenizer's folder by --tokenizer",
    "--code-revision": "RayLLM runs no code from models",
    "--allowed-methods": "the methods of each path are fixed",
    "--allowed-headers": "pages of --allowed-origins may send every header",
    "--allow-credentials": "clients send their key in a header",
}


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in RayLLM's own flags, and a line for each flag that has no effect here. Flags may be written
    with underscores. Raises `UsageError`, with the reason, for what cannot be served."""
    words = iter([_with_dashes(word) for word in argv])
    ours: list[str] = []
    notes: list[str] = []
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag in _REFUSED:
            raise UsageError(f"{flag} is not supported: {_REFUSED[flag]}")
        if flag in _WITHOUT_VALUE and not has_value:
            notes.append(f"{flag} has no effect: {_WITHOUT_VALUE[flag]}")
        elif flag in _WITH_VALUE:
            value = value if has_value else _value_of(flag, words)
            notes.append(f"{flag} {value} has no effect: {_WITH_VALUE[flag]}")
        elif flag in _ONE_VALUE:
            value = value if has_value else _value_of(flag, words)
            only, reason = _ONE_VALUE[flag]
            if value != only:
                raise UsageError(f"{flag} {value} is not supported: {reason}; give {only}, or leave it out")
        elif flag == "--allowed-origins":
            for origin in _texts(value if has_value else _value_of(flag, words)):
                ours += [flag, origin]
        else:
            ours.append(word)
    return ours, notes


def _with_dashes(word: str) -> str:
    """`--max_model_len=5` as `--max-model-len=5`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _value_of(flag: str, words: Iterator[str]) -> str:
    value = next(words, None)
    if value is None:
        raise UsageError(f"argument {flag}: expected one argument")
    return value


def _texts(value: str) -> list[str]:
    """A JSON list of texts, as vLLM takes it, or one text."""
    if not value.startswith("["):
        return [value]
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UsageError(f"--allowed-origins {value}: give an origin, or a JSON list of them")
    return found
