"""Golden tests of an architecture: log-probabilities against a reference, however the work is cut, split or rounded.

def test_the_model_equals_transformers(tmp_path, two_ranks):
    check_against_transformers(make_checkpoint(tmp_path, config, tokenizer=False), two_ranks)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ranks import RankPool
from teacher import expert_parallel_log_probs, log_probs_of_folder

from rayllm.distributed.groups import TensorParallel

TOLERANCE = 1e-4
BLOCK_SIZE = 4
LENGTHS = (37, 12, 25, 25, 1)
WHOLE = max(LENGTHS)
CUTS = [[size] * len(LENGTHS) for size in (1, 5, 16, WHOLE)] + [[16, WHOLE, 1, 5, 1]]
"""Chunk sizes by sequence; the last mixes decode rows, chunks and whole prompts in each batch."""


def make_sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random token ids."""
    draw = random.Random(7)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def transformers_log_probs(
    path: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[np.ndarray]:
    """What `transformers` gives for the model in a folder, `[tokens, vocabulary]` for each sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    return [model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1).numpy() for tokens in sequences]


def largest_difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    assert [part.shape for part in found] == [part.shape for part in expected]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def check_log_probs(
    path: Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    two_ranks: RankPool | None,
    tolerance: float = TOLERANCE,
    *,
    expert_parallel: bool = False,
) -> None:
    """The model in folder `path` gives the expected log-probabilities in float32, on one rank and on two, whole and in
    chunks; both ranks give the same bits. `expert_parallel`: also with whole experts shared out over two ranks."""
    cuts = [chunks[: len(sequences)] for chunks in CUTS]
    alone = log_probs_of_folder(TensorParallel(), str(path), sequences, cuts, BLOCK_SIZE)
    for chunks, one in zip(cuts, alone, strict=True):
        assert largest_difference(one, expected) < tolerance, f"one rank, chunks {chunks}"
    if two_ranks is None:
        return
    for split in (log_probs_of_folder, expert_parallel_log_probs) if expert_parallel else (log_probs_of_folder,):
        first, second = two_ranks.run(split, str(path), sequences, cuts, BLOCK_SIZE)
        for chunks, left, right in zip(cuts, first, second, strict=True):
            assert largest_difference(left, expected) < tolerance, f"two ranks, {split.__name__}, chunks {chunks}"
            assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True)), "ranks differ"


def check_bfloat16(
    path: Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    reference: Path | Sequence[np.ndarray] | None = None,
    *,
    quantile: float = 1.0,
) -> None:
    """In bfloat16 the model is at most twice as far from `expected` (float32) as `transformers` in bfloat16 is, at the
    worst position or another quantile of them: with the model of the same folder, or of the folder `reference`, or by
    what it gave."""
    if reference is None or isinstance(reference, Path):
        reference = transformers_log_probs(reference or path, sequences, torch.bfloat16)
    cuts = [CUTS[-1][: len(sequences)]]
    found = log_probs_of_folder(TensorParallel(), str(path), sequences, cuts, BLOCK_SIZE, dtype=torch.bfloat16)[0]
    ours, theirs = (np.quantile(_errors(each, expected), quantile) for each in (found, reference))
    assert ours <= 2 * theirs


def _errors(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> np.ndarray:
    """The largest difference at each position of all sequences."""
    return np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(found, expected, strict=True)])


def check_against_transformers(
    path: Path,
    two_ranks: RankPool | None,
    *,
    tolerance: float = TOLERANCE,
    bfloat16: bool = True,
    expert_parallel: bool = False,
) -> None:
    """`check_log_probs` and `check_bfloat16` with random tokens, against `transformers`' own model of the folder.
    `expert_parallel`: it is a mixture of experts."""
    import json

    config = json.loads((path / "config.json").read_text())
    sequences = make_sequences(config.get("text_config", config)["vocab_size"])
    expected = transformers_log_probs(path, sequences)
    check_log_probs(path, sequences, expected, two_ranks, tolerance, expert_parallel=expert_parallel)
    if bfloat16:
        # Rounding flips close choices of experts; the error there says nothing of the arithmetic.
        check_bfloat16(path, sequences, expected, quantile=0.5 if expert_parallel else 1.0)
