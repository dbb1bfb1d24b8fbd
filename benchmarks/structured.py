"""What structured output costs: CPU milliseconds to compile a grammar and for each mask, and tokens a second of the
built-in model, bound and free, in the same run. One JSON line.

    python benchmarks/structured.py [--tokenizer FOLDER] [--num-masks 200] [--batch-size 8] [--no-generate]

Masks are measured along a random walk through each grammar: the first, the median and the largest. `apply_ms` is what
the sampler takes to apply one row's mask.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from rayllm import LLM, SamplingParams, StructuredOutputsParams
from rayllm.demo import model_path
from rayllm.messages import RowParams
from rayllm.sampling.sampler import Sampler
from rayllm.structured.matcher import new_matcher
from rayllm.structured.vocabulary import Vocabulary
from rayllm.transfer.upload import Upload

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json_object": StructuredOutputsParams(json_object=True),
    "schema": StructuredOutputsParams(json=_PERSON),
    "schema_300_properties": StructuredOutputsParams(
        json={"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(300)}}
    ),
    "choice_1000": StructuredOutputsParams(choice=tuple(f"answer number {i}" for i in range(1000))),
    "regex": StructuredOutputsParams(regex=r"[a-z]{3,20}@[a-z]{3,20}\.(com|org)"),
    "regex_costly": StructuredOutputsParams(regex=r"(\w+\s?){1,500}"),
    "regex_many_states": StructuredOutputsParams(regex=r"(.*a.{20})"),
}


def timed_ms(work: Callable[[], object]) -> float:
    """CPU time of this thread: other processes are not counted."""
    began = time.thread_time()
    work()
    return (time.thread_time() - began) * 1000


def measure(structured: StructuredOutputsParams, vocabulary: Vocabulary, num_masks: int) -> dict[str, float]:
    compile_ms = min(timed_ms(lambda: new_matcher(structured, vocabulary)) for _ in range(3))
    matcher, draw = new_matcher(structured, vocabulary), random.Random(0)
    copy_ms = timed_ms(matcher.deep_copy)
    masks_ms, consume_ms = [], []
    walker = matcher.deep_copy()
    for _ in range(num_masks):
        if walker.is_stopped():
            walker = matcher.deep_copy()
        masks_ms.append(timed_ms(walker.compute_bitmask))
        bits = walker.compute_bitmask()  # known by now
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").nonzero()[0]
        consume_ms.append(timed_ms(partial(walker.consume_token, int(draw.choice(allowed)))))
    results = {
        "compile_ms": compile_ms,
        "copy_ms": copy_ms,
        "first_mask_ms": masks_ms[0],
        "mask_ms": statistics.median(masks_ms),
        "largest_mask_ms": max(masks_ms),
        "consume_ms": statistics.median(consume_ms),
    }
    return {name: round(value, 4) for name, value in results.items()}


def apply_ms(vocab_size: int, num_rows: int) -> float:
    sampler = Sampler(
        max_rows=num_rows, vocab_size=vocab_size, max_model_len=64, eos_token_ids=(), device=torch.device("cpu")
    )
    for row in range(num_rows):
        sampler.set_row(row, RowParams(temperature=0), 0, 0, [1], 1)
    logits_NV = torch.randn((num_rows, vocab_size))
    masks = list(range(num_rows)), np.full((num_rows, -(-vocab_size // 8)), 0xFF, np.uint8)
    upload, last_token_M = Upload(torch.device("cpu")), torch.zeros(num_rows, dtype=torch.int64)

    def sample_once(masks: tuple[list[int], np.ndarray] | None) -> None:
        draws = sampler.prepare(upload, list(range(num_rows)), masks)
        upload.send()
        sampler.sample(logits_NV, draws, last_token_M)

    free = min(timed_ms(partial(sample_once, None)) for _ in range(9))
    bound = min(timed_ms(partial(sample_once, masks)) for _ in range(9))
    return round((bound - free) / num_rows, 4)


def generation_rates(batch_size: int, num_tokens: int) -> dict[str, float]:
    """Tokens a second of the built-in model; texts are bound so that they do not end before the others."""
    rates: dict[str, float] = {}
    words = StructuredOutputsParams(regex=r"[a-z ,.]{1,5000}")
    schema = StructuredOutputsParams(json={"type": "array", "items": {"type": "string"}, "minItems": 2000})
    with LLM("", device="cpu", max_num_seqs=batch_size) as llm:
        runs = {"warm": None, "free": None, "regex": words, "schema": schema, "free_again": None}
        for name, structured in runs.items():
            params = SamplingParams(
                max_tokens=num_tokens, ignore_eos=True, seed=1, structured_outputs=structured, temperature=1.0
            )
            began = time.perf_counter()
            outputs = llm.generate(["Once upon a time"] * batch_size, params, use_tqdm=False)
            num_generated = sum(len(output.outputs[0].token_ids) for output in outputs)
            rates[name] = round(num_generated / (time.perf_counter() - began), 1)
    del rates["warm"]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(model_path()), help="folder with a tokenizer.json")
    parser.add_argument("--num-masks", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--generate", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    began = time.perf_counter()
    vocabulary = Vocabulary.load(arguments.tokenizer, 1, ())
    vocab_size = vocabulary.tokenizer.vocab_size
    results: dict[str, object] = {
        "vocab_size": vocab_size,
        "load_s": round(time.perf_counter() - began, 3),
        "apply_ms": apply_ms(vocab_size, arguments.batch_size),
        "grammars": {name: measure(given, vocabulary, arguments.num_masks) for name, given in GRAMMARS.items()},
    }
    if arguments.generate:
        results["tokens_per_s"] = generation_rates(arguments.batch_size, arguments.num_tokens)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
