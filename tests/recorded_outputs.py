"""Records what a fixed set of requests gives, bit for bit, so that a change that must not change results can show it.

    python tests/recorded_outputs.py write FILE      # at the commit before
    python tests/recorded_outputs.py compare FILE    # at the commit after, on the same machine

The set: log-probabilities of every architecture at one and two ranks, whole and in chunks; tokens and log-probabilities
of requests with penalties, grammars, bad words, several choices and replay after preemption, in an ample and in a
starved KV pool. All in float32, with one thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from ranks import RankPool
from teacher import log_probs_of_folder
from tiny import ARCHITECTURES, make_checkpoint

from rayllm import LLM, SamplingParams, StructuredOutputsParams
from rayllm.distributed.groups import TensorParallel
from rayllm.request import RequestOutput

_SEQUENCES = [[(7 * i + 13 * n) % 288 for i in range(n)] for n in (37, 12, 25, 25, 1)]
_CUTS = [[chunk] * len(_SEQUENCES) for chunk in (1, 5, 37)] + [[16, 37, 1, 5, 1]]
_BLOCK_SIZE = 4
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama odd vocabulary": ("llama", {"vocab_size": 289}),
    "llama gelu, one kv head": ("llama", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "opt norm last": ("opt", {"do_layer_norm_before": False}),
}
_PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.1, seed=2, top_k=20, top_p=0.9, max_tokens=20, n=2, logprobs=1),
    SamplingParams(temperature=0.8, seed=3, max_tokens=33, repetition_penalty=1.3, presence_penalty=0.5, logprobs=1),
    SamplingParams(temperature=0.7, seed=-3, min_p=0.05, max_tokens=17, frequency_penalty=0.4, logprobs=1),
    SamplingParams(temperature=1, seed=4, max_tokens=40, min_tokens=10, logit_bias={2: 4.0}, logprobs=1),
    SamplingParams(seed=5, n=2, max_tokens=40, structured_outputs=StructuredOutputsParams(regex="([a-z]{3,9} ){4}")),
    SamplingParams(temperature=1.5, seed=6, max_tokens=24, bad_words_token_ids=tuple((i,) for i in range(0, 256, 2))),
]
_PROMPTS = [[(11 * i + 29 * n) % 280 + 3 for i in range(n)] for n in (5, 30, 64, 17, 40, 9, 70)]
_POOLS: dict[str, dict[str, Any]] = {
    "ample": {"num_kv_blocks": 400, "max_num_batched_tokens": 512},
    "starved, chunks of 16": {"num_kv_blocks": 14, "max_num_batched_tokens": 16},
}


def record() -> dict[str, str]:
    """A hash of the bits of each part of the set, by its name."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    pool = RankPool(2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, (architecture, overrides)) in enumerate(_VARIANTS.items()):
                path = str(make_checkpoint(Path(folder) / str(number), architecture, **overrides))
                arguments = (path, _SEQUENCES, _CUTS, _BLOCK_SIZE)
                found[f"{name}, one rank"] = _hash(_flat(log_probs_of_folder(TensorParallel(), *arguments)))
                ranks = pool.run(log_probs_of_folder, *arguments)
                found[f"{name}, two ranks"] = _hash(_flat(ranks[0]))
                assert _hash(_flat(ranks[1])) == found[f"{name}, two ranks"], "ranks differ"
                if overrides == {}:
                    found |= {f"{name}, {pool_name}": _hash(_generate(path, pool_name)) for pool_name in _POOLS}
    finally:
        pool.close()
    return found


def _flat(cuts: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [part for cut in cuts for part in cut]


def _generate(path: str, pool_name: str) -> list[np.ndarray]:
    settings: dict[str, Any] = {"block_size": 16, "max_model_len": 200, "device": "cpu", **_POOLS[pool_name]}
    with LLM(path, **settings) as llm:
        outputs = llm.generate(_PROMPTS, _PARAMS, use_tqdm=False)
    return [part for output in outputs for part in _numbers(output)]


def _numbers(output: RequestOutput) -> list[np.ndarray]:
    """Tokens, then every log-probability asked for, in order of position and rank."""
    entries = [entry for entry in output.prompt_logprobs or [] if entry]
    parts = []
    for choice in output.outputs:
        parts.append(np.array(choice.token_ids, np.int64))
        entries += choice.logprobs or []
    values = [(token_id, entry[token_id].logprob) for entry in entries for token_id in sorted(entry)]
    return [*parts, np.array(values, np.float64)]


def _hash(parts: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.shape).encode() + part.tobytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("write", "compare"):
        print(__doc__, file=sys.stderr)
        return 2
    found, file = record(), Path(arguments[1])
    if arguments[0] == "write":
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} parts recorded in {file}")
        return 0
    before = json.loads(file.read_text())
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print("\n".join(f"changed: {name}" for name in changed) or f"all {len(found)} parts are the same, bit for bit")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
