"""Flags of vLLM's servers that are no settings of RayLLM: accepted, mapped, or refused with the reason."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from rayllm.cli.dotted_flags import join_dotted
from rayllm.cli.flags import UsageError
from rayllm.errors import ConfigError

_ON_RAY = "RayLLM always serves on Ray"
_LOGS = "see --log-file and --log-format"
_NO_PROMPTS_LOGGED = "prompts and answers are never logged"
_ANY_CONTEXT = "CUDA graphs hold for every context length"
_NO_COMPILER = "RayLLM compiles no model"
_ALWAYS = "this is always so"
_TEXT_ONLY = "RayLLM reads text only"
_NO_EXPERTS = "it is for mixtures of experts"
_NO_MAMBA = "it is for state-space models"
_NO_LORA = "it is for LoRA adapters, which RayLLM does not have yet"
_ONE_BACKEND = "see --attention-backend"
_LLGUIDANCE = "structured outputs are always matched by llguidance"
_SLICES = "each rank reads its slices of the weights alone"
_PREFILLS = "prompts share the token budget of a step, see --max-num-batched-tokens"
_METRICS = "see /metrics"
_RAY_JOINS = "Ray joins nodes: start it on each, and set RAY_ADDRESS"
_HEADERS = "the proxy before the server bounds headers"

_NO_CODE = "servers run no code of others"
_TLS = "this server speaks plain HTTP: put a proxy that speaks TLS before it"
_ONE_ENGINE = "RayLLM has no replicas of an engine yet: start several servers"
_IN_CONFIG = "change it by --hf-overrides, as --hf-overrides.rope_theta 1e6"
_LISTENS = "this server listens at --host and --port only"

_WITHOUT_VALUE = {
    "--disable-log-requests": _LOGS,
    "--enable-log-requests": _LOGS,
    "--disable-uvicorn-access-log": _LOGS,
    "--log-error-stack": _LOGS,
    "--aggregate-engine-logging": _LOGS,
    "--enable-log-outputs": _NO_PROMPTS_LOGGED,
    "--enable-log-deltas": _NO_PROMPTS_LOGGED,
    "--disable-frontend-multiprocessing": "see --num-ingress-replicas",
    "--worker-use-ray": _ON_RAY,
    "--engine-use-ray": _ON_RAY,
    "--numa-bind": "Ray places processes",
    "--use-v2-block-manager": _ALWAYS,
    "--async-scheduling": "steps are always planned while the one before runs",
    "--disable-async-output-proc": "answers are always written beside the steps",
    "--multi-step-stream-outputs": "each step's tokens are always sent as they come",
    "--send-delta-data": "workers always get only what changed",
    "--enable-request-id-headers": _ALWAYS,
    "--enable-server-load-tracking": _ALWAYS,
    "--enable-prompt-tokens-details": _ALWAYS,
    "--use-tqdm-on-load": "a terminal always shows the stages of a start",
    "--fail-on-environ-validation": "of vLLM's variables, RayLLM reads VLLM_USE_MODELSCOPE alone",
    "--guided-decoding-disable-fallback": _LLGUIDANCE,
    "--calculate-kv-scales": "the KV cache has the model's type",
    "--kv-sharing-fast-prefill": "no layers share KV",
    "--disable-cascade-attn": _ONE_BACKEND,
    "--enable-flashinfer-autotune": _ONE_BACKEND,
    "--disable-hybrid-kv-cache-manager": "all layers have one kind of KV cache",
    "--enable-dbo": _NO_EXPERTS,
    "--enable-eplb": _NO_EXPERTS,
    "--enable-lora-bias": _NO_LORA,
    "--fully-sharded-loras": _NO_LORA,
    "--enable-mm-embeds": _TEXT_ONLY,
    "--interleave-mm-strings": _TEXT_ONLY,
    "--skip-mm-profiling": _TEXT_ONLY,
    "--language-model-only": _ALWAYS,
    "--disable-mm-preprocessor-cache": _TEXT_ONLY,
    "--disable-chunked-mm-input": _TEXT_ONLY,
    "--kv-cache-metrics": _METRICS,
    "--cudagraph-metrics": _METRICS,
    "--enable-mfu-metrics": _METRICS,
    "--enable-layerwise-nvtx-tracing": "see --otlp-traces-endpoint",
}
"""Flags without a value, also with `--no-` before their name, that change nothing here, and why."""

_WITH_VALUE = {
    "--uvicorn-log-level": _LOGS,
    "--log-level": _LOGS,
    "--log-config-file": _LOGS,
    "--disable-access-log-for-endpoints": _LOGS,
    "--max-log-len": _LOGS,
    "--max-seq-len-to-capture": _ANY_CONTEXT,
    "--max-context-len-to-capture": _ANY_CONTEXT,
    "--compilation-config": _NO_COMPILER,
    "-O": _NO_COMPILER,
    "--optimization-level": _NO_COMPILER,
    "--performance-mode": _NO_COMPILER,
    "--attention-config": _ONE_BACKEND,
    "--gdn-prefill-backend": _ONE_BACKEND,
    "--moe-backend": _NO_EXPERTS,
    "--all2all-backend": _NO_EXPERTS,
    "--eplb-config": _NO_EXPERTS,
    "--expert-placement-strategy": _NO_EXPERTS,
    "--num-redundant-experts": _NO_EXPERTS,
    "--mamba-cache-dtype": _NO_MAMBA,
    "--mamba-ssm-cache-dtype": _NO_MAMBA,
    "--mamba-cache-mode": _NO_MAMBA,
    "--mamba-block-size": _NO_MAMBA,
    "--max-loras": _NO_LORA,
    "--max-lora-rank": _NO_LORA,
    "--max-cpu-loras": _NO_LORA,
    "--lora-dtype": _NO_LORA,
    "--lora-extra-vocab-size": _NO_LORA,
    "--default-mm-loras": _NO_LORA,
    "--max-parallel-loading-workers": _SLICES,
    "--safetensors-load-strategy": _SLICES,
    "--pt-load-map-location": _SLICES,
    "--ignore-patterns": "only files that are read are downloaded",
    "--guided-decoding-backend": _LLGUIDANCE,
    "--limit-mm-per-prompt": _TEXT_ONLY,
    "--media-io-kwargs": _TEXT_ONLY,
    "--mm-processor-kwargs": _TEXT_ONLY,
    "--mm-processor-cache-gb": _TEXT_ONLY,
    "--mm-processor-cache-type": _TEXT_ONLY,
    "--mm-encoder-tp-mode": _TEXT_ONLY,
    "--mm-encoder-attn-backend": _TEXT_ONLY,
    "--video-pruning-rate": _TEXT_ONLY,
    "--allowed-local-media-path": _TEXT_ONLY,
    "--allowed-media-domains": _TEXT_ONLY,
    "--prefix-caching-hash-algo": "RayLLM has one way to hash blocks",
    "--max-num-partial-prefills": _PREFILLS,
    "--max-long-partial-prefills": _PREFILLS,
    "--long-prefill-token-threshold": _PREFILLS,
    "--scheduler-delay-factor": _PREFILLS,
    "--num-lookahead-slots": "blocks are taken as tokens need them",
    "--scheduling-policy": "requests are served by priority, and those of one priority in order of arrival",
    "--show-hidden-metrics-for-version": _METRICS,
    "--collect-detailed-traces": "see --otlp-traces-endpoint",
    "--data-parallel-backend": _ON_RAY,
    "--master-addr": _RAY_JOINS,
    "--master-port": _RAY_JOINS,
    "--h11-max-incomplete-event-size": _HEADERS,
    "--h11-max-header-count": _HEADERS,
}
"""Flags with a value that change nothing here, and why."""

_SEVERAL_VALUES = frozenset({"--disable-access-log-for-endpoints"})
"""Those of them whose value ends at the next flag."""

_ONE_VALUE = {
    "--response-role": (("assistant",), "answers are always the assistant's"),
    "--num-scheduler-steps": (("1",), "RayLLM plans one step at a time"),
    "--stream-interval": (("1",), "every step's tokens are sent as they come"),
    "--preemption-mode": (("recompute",), "RayLLM computes preempted sequences again"),
    "--tokenizer-pool-size": (("0",), "RayLLM tokenizes in the ingress"),
    "--convert": (("auto", "none"), "RayLLM serves models that generate"),
    "--config-format": (("auto", "hf"), "RayLLM reads config.json"),
    "--logprobs-mode": (("raw_logprobs",), "log-probabilities are those before temperature and penalties"),
    "--worker-cls": (("auto",), _NO_CODE),
    "--model-loader-extra-config": (("{}",), "RayLLM has one way to load weights"),
    "--additional-config": (("{}",), "RayLLM has no platform plugins"),
    "--kv-offloading-size": (("0",), "RayLLM keeps no KV blocks in CPU memory"),
    "--nnodes": (("1",), _RAY_JOINS),
    "-n": (("1",), _RAY_JOINS),
    "--node-rank": (("0",), _RAY_JOINS),
    "-r": (("0",), _RAY_JOINS),
    "--decode-context-parallel-size": (("1",), "RayLLM has no context parallelism"),
    "-dcp": (("1",), "RayLLM has no context parallelism"),
    "--prefill-context-parallel-size": (("1",), "RayLLM has no context parallelism"),
    "-pcp": (("1",), "RayLLM has no context parallelism"),
    "--data-parallel-size-local": (("1",), _ONE_ENGINE),
    "-dpl": (("1",), _ONE_ENGINE),
    "--allowed-methods": (('["*"]', "*"), "the methods of each path are fixed"),
    "--allowed-headers": (('["*"]', "*"), "pages of --allowed-origins may send every header"),
}
"""Flags with the values that are true here, and why others are refused."""

_REFUSED = {
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--ssl-ca-certs": _TLS,
    "--ssl-cert-reqs": _TLS,
    "--ssl-ciphers": _TLS,
    "--enable-ssl-refresh": _TLS,
    "--uds": _LISTENS,
    "--grpc": _LISTENS,
    "--headless": _ONE_ENGINE,
    "--data-parallel-rank": _ONE_ENGINE,
    "--data-parallel-start-rank": _ONE_ENGINE,
    "--data-parallel-address": _ONE_ENGINE,
    "--data-parallel-rpc-port": _ONE_ENGINE,
    "--data-parallel-hybrid-lb": _ONE_ENGINE,
    "--data-parallel-external-lb": _ONE_ENGINE,
    "--root-path": "this server answers at the root: put a proxy that rewrites paths before it",
    "--middleware": f"{_NO_CODE}: put a proxy before it",
    "--worker-extension-cls": _NO_CODE,
    "--scheduler-cls": _NO_CODE,
    "--logits-processors": _NO_CODE,
    "--logits-processor-pattern": _NO_CODE,
    "--io-processor-plugin": _NO_CODE,
    "--reasoning-parser-plugin": f"{_NO_CODE}; see --reasoning-parser",
    "--tool-parser-plugin": f"{_NO_CODE}; see --tool-call-parser",
    "--tool-server": "tools are called by the client",
    "--disable-fastapi-docs": "/docs is always served",
    "--rope-scaling": _IN_CONFIG,
    "--rope-theta": _IN_CONFIG,
    "--rope-parameters": _IN_CONFIG,
    "--disable-sliding-window": "change it by --hf-overrides, as --hf-overrides.sliding_window null",
    "--hf-config-path": "give MODEL a folder with its config.json",
    "--hf-token": "set the environment variable HF_TOKEN",
    "--guided-decoding-disable-any-whitespace": "send structured_outputs.disable_any_whitespace with the request",
    "--enable-prompt-embeds": "send text or token ids",
    "--enable-sleep-mode": "stop the server and start it again",
    "--enable-return-routed-experts": _NO_EXPERTS,
    "--weight-transfer-config": "the weights of a server do not change",
    "--kv-transfer-config": "prefill and decoding run in one engine",
    "--ec-transfer-config": _TEXT_ONLY,
    "--kv-events-config": "events of the KV cache are not published",
    "--tokens-only": "see --skip-tokenizer-init",
    "--tokenizer-revision": "give the tokenizer's folder by --tokenizer",
    "--code-revision": "RayLLM runs no code from models",
    "--ray-workers-use-nsight": "start nsys yourself",
    "--allow-credentials": "clients send their key in a header",
    "--exclude-tools-when-tool-choice-none": "leave the tools out of such requests",
    "--default-chat-template-kwargs": "send chat_template_kwargs with each request",
    "--profiler-config": "RayLLM has no profiler endpoints",
}

_OTHER_NAMES = {
    "--num-gpu-blocks-override": "--num-kv-blocks",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--api-server-count": "--num-ingress-replicas",
    "-asc": "--num-ingress-replicas",
    "--cuda-graph-sizes": "--max-cudagraph-capture-size",
    "--cudagraph-capture-sizes": "--max-cudagraph-capture-size",
}
"""Flags that have another name here."""

_GRAPH_SIZES = frozenset({"--cuda-graph-sizes", "--cudagraph-capture-sizes"})
"""Those of them with several values, of which the largest counts here."""

_STRUCTURED = "--structured-outputs-config"
_STRUCTURED_WITHOUT_EFFECT = frozenset({"backend", "disable_fallback"})
_EXECUTORS = ("mp", "uni")


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in RayLLM's own flags, and a line for each flag that has no effect here. Flags may be written
    with underscores, and entries of JSON values with dots (`--FLAG.name value`). Raises `UsageError`, with the reason,
    for what cannot be served."""
    words = _Words(join_dotted([_with_dashes(word) for word in argv]))
    ours: list[str] = []
    notes: list[str] = []
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag in _REFUSED:
            raise UsageError(f"{flag} is not supported: {_REFUSED[flag]}")
        if _positive(flag) in _WITHOUT_VALUE and not has_value:
            notes.append(f"{flag} has no effect: {_WITHOUT_VALUE[_positive(flag)]}")
        elif _is_optimization_level(flag):
            notes.append(f"{word} has no effect: {_NO_COMPILER}")
        elif flag in _WITH_VALUE:
            value = value if has_value else words.value_of(flag)
            further = words.until_flag() if flag in _SEVERAL_VALUES else []
            notes.append(f"{' '.join([flag, value, *further])} has no effect: {_WITH_VALUE[flag]}")
        elif flag in _GRAPH_SIZES:
            sizes = [value if has_value else words.value_of(flag), *words.until_flag()]
            ours += [_OTHER_NAMES[flag], " ".join(sizes)]
        elif flag in _ONE_VALUE:
            _check_value(flag, value if has_value else words.value_of(flag))
        elif flag == _STRUCTURED:
            notes.append(_structured_note(value if has_value else words.value_of(flag)))
        elif flag == "--allowed-origins":
            for origin in _texts(value if has_value else words.value_of(flag)):
                ours += [flag, origin]
        elif flag == "--distributed-executor-backend":
            value = value if has_value else words.value_of(flag)
            if value in _EXECUTORS:
                notes.append(f"{flag} {value} has no effect: {_ON_RAY}")
            else:
                ours += [flag, value]
        else:
            ours.append(_OTHER_NAMES.get(flag, flag) + has_value + value)
    return ours, notes


def translate_setting(name: str, value: Any) -> tuple[str | None, str]:
    """The same for a setting of a YAML file: RayLLM's name, or None for one that has no effect, and then the line about
    it. Raises `ConfigError`, with the reason, for what cannot be served."""
    flag = "--" + name.replace("_", "-")
    if flag in _OTHER_NAMES:
        return _OTHER_NAMES[flag].removeprefix("--").replace("-", "_"), ""
    if not any(flag in table for table in (_WITHOUT_VALUE, _WITH_VALUE, _ONE_VALUE, _REFUSED, {_STRUCTURED})):
        return name, ""
    if value is False or value is None:  # asks for nothing
        return None, ""
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    try:
        _, notes = translate([flag] if value is True else [f"{flag}={text}"])
    except UsageError as error:
        raise ConfigError(str(error)) from None
    return None, "".join(notes)


class _Words:
    """The words of a command line, of which a flag may take those behind it."""

    def __init__(self, words: Sequence[str]):
        self._words = deque(words)

    def __iter__(self) -> Iterator[str]:
        while self._words:
            yield self._words.popleft()

    def value_of(self, flag: str) -> str:
        if not self._words:
            raise UsageError(f"argument {flag}: expected one argument")
        return self._words.popleft()

    def until_flag(self) -> list[str]:
        found = []
        while self._words and not self._words[0].startswith("-"):
            found.append(self._words.popleft())
        return found


def _with_dashes(word: str) -> str:
    """`--max_model_len=5` as `--max-model-len=5`; what stands behind a dot is a name inside of a JSON value."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    name, dot, inner = flag.partition(".")
    return name.replace("_", "-") + dot + inner + equals + value


def _positive(flag: str) -> str:
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def _is_optimization_level(flag: str) -> bool:
    """`-O3`, whose value is part of the word."""
    return flag.startswith("-O") and flag[2:].isdecimal()


def _check_value(flag: str, value: str) -> None:
    served, reason = _ONE_VALUE[flag]
    if value not in served:
        raise UsageError(f"{flag} {value} is not supported: {reason}; give {' or '.join(served)}, or leave it out")


def _structured_note(value: str) -> str:
    """What is said of `--structured-outputs-config`. Raises `UsageError` for settings that would have an effect."""
    try:
        given = json.loads(value)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UsageError(f"{_STRUCTURED} {value}: give a JSON object")
    for name in given:
        if name not in _STRUCTURED_WITHOUT_EFFECT:
            raise UsageError(
                f"{_STRUCTURED}: {name!r} is not supported: see --reasoning-parser, and structured_outputs of a request"
            )
    return f"{_STRUCTURED} {value} has no effect: {_LLGUIDANCE}"


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
