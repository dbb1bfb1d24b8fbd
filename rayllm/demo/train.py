"""Train the built-in model: `python -m rayllm.demo.train [--output DIR] [--steps N] [--seed 0]`.

From random weights to the committed checkpoint in a little over half an hour of one CPU core. The same seed,
number of threads and machine give the same weights, bit for bit.
Shapes: B rows, T tokens of a row, L tokens to be learned, D width, V vocabulary.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from rayllm.demo import model_path
from rayllm.demo.conversations import (
    FIFTH_MIX,
    FIRST_MIX,
    FOURTH_MIX,
    SECOND_MIX,
    SIXTH_MIX,
    THIRD_MIX,
    ConversationSource,
    Mix,
)
from rayllm.demo.corpus import load_corpus
from rayllm.demo.tokenizer import END_ID, PAD_ID, VOCAB_SIZE, encode_example, save_tokenizer, train_tokenizer

BATCH_TOKENS = 2048
MAX_ROW_TOKENS = 2000
EXAMPLES_PER_ROUND = 384
# The text of an answer is soon known by heart; which answer to give is what takes practice. So many examples
# (`shortened_share`) stop after the first tokens of their last answer, which gives time for more questions.
NUM_LEADING_TOKENS = 10
MAX_EAGER_TOKENS = 300  # up to here, plain attention is the faster one on a CPU
NUM_WARMUP_STEPS = 100
NUM_THREADS = 1
LOG_EVERY = 100
SAVED_CONFIG_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


@dataclass(frozen=True)
class Phase:
    """A part of the training, with its own warm-up and its own cosine."""

    num_steps: int
    peak_learning_rate: float
    shortened_share: float
    mix: Mix


PHASES = (
    Phase(2600, peak_learning_rate=2.5e-3, shortened_share=0.7, mix=FIRST_MIX),
    Phase(1500, peak_learning_rate=2.0e-3, shortened_share=0.6, mix=SECOND_MIX),
    Phase(1200, peak_learning_rate=1.5e-3, shortened_share=0.6, mix=THIRD_MIX),
    Phase(1500, peak_learning_rate=1.5e-3, shortened_share=0.6, mix=FOURTH_MIX),
    Phase(900, peak_learning_rate=1.2e-3, shortened_share=0.4, mix=FIFTH_MIX),
    Phase(500, peak_learning_rate=8e-4, shortened_share=0.6, mix=SIXTH_MIX),
)
NUM_STEPS = sum(phase.num_steps for phase in PHASES)


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, padded on the right, and which of them are to be predicted."""

    tokens_BT: torch.Tensor
    learned_BT: torch.Tensor


def demo_config() -> LlamaConfig:
    """A Llama of 3.5 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def batches(source: ConversationSource, tokenizer: Tokenizer, seed: int, shortened_share: float) -> Iterator[Batch]:
    """Endless batches of about BATCH_TOKENS tokens. Rows of one batch have similar lengths, to pad little."""
    draw = random.Random(seed)
    while True:
        examples = [encode_example(source.draw(), tokenizer) for _ in range(EXAMPLES_PER_ROUND)]
        examples = [_shorten(*e) if draw.random() < shortened_share else e for e in examples]
        examples = sorted((e for e in examples if len(e[0]) <= MAX_ROW_TOKENS), key=lambda e: len(e[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for example in examples:
            if (len(groups[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        draw.shuffle(groups)
        yield from (_pad(group) for group in groups)


def _shorten(ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
    """The example up to the first tokens of its last answer."""
    end = len(learned) - learned[::-1].index(True)
    start = end - 1
    while start > 0 and learned[start - 1]:
        start -= 1
    cut = min(end, start + NUM_LEADING_TOKENS)
    return ids[:cut], learned[:cut]


def _pad(group: list[tuple[list[int], list[bool]]]) -> Batch:
    width = max(len(ids) for ids, _ in group)
    tokens_BT = torch.full((len(group), width), PAD_ID)
    learned_BT = torch.zeros((len(group), width), dtype=torch.bool)
    for row, (ids, learned) in enumerate(group):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        learned_BT[row, : len(ids)] = torch.tensor(learned)
    return Batch(tokens_BT, learned_BT)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens.

    Padding stands on the right, where causal attention never sees it.
    """
    short = batch.tokens_BT.shape[1] <= MAX_EAGER_TOKENS
    model.set_attn_implementation("eager" if short else "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = model.model(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
        hidden_LD = hidden_BTD[:, :-1][batch.learned_BT[:, 1:]]
        logits_LV = model.lm_head(hidden_LD)
    targets_L = batch.tokens_BT[:, 1:][batch.learned_BT[:, 1:]]
    return functional.cross_entropy(logits_LV.float(), targets_L)


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero."""
    warmup = min(NUM_WARMUP_STEPS, max(1, num_steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; the norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(num_steps: int, seed: int, num_threads: int = NUM_THREADS) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Train from random weights for `num_steps` steps, divided among the phases as in PHASES.

    Sets torch's threads, seed and deterministic mode for the process.
    """
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus)
    model = LlamaForCausalLM(demo_config())
    for number, phase in enumerate(PHASES):
        source = ConversationSource(corpus, seed + number, phase.mix)
        stream = batches(source, tokenizer, seed + number, phase.shortened_share)
        run_phase(model, stream, phase, max(1, round(num_steps * phase.num_steps / NUM_STEPS)))
    return model.eval(), tokenizer


def run_phase(model: LlamaForCausalLM, stream: Iterator[Batch], phase: Phase, num_steps: int) -> None:
    """Train in place. The phase leaves the weights as a checkpoint holds them, rounded to bfloat16."""
    optimizer = make_optimizer(model)
    started_s, mean_loss = time.monotonic(), 0.0
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, phase.peak_learning_rate)
        loss = loss_of(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss += loss.item() / LOG_EVERY
        if (step + 1) % LOG_EVERY == 0:
            elapsed_s = time.monotonic() - started_s
            print(f"step {step + 1}/{num_steps}  loss {mean_loss:.4f}  {elapsed_s:.0f} s", flush=True)
            mean_loss = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint that transformers and RayLLM load.

    The weights are stored as bfloat16 to stay small, while the config says float32: loading widens
    them without loss, and sums in float32 leave the greedy answers no room to waver.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", _config_to_save(model.config))
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [END_ID], "pad_token_id": PAD_ID},
    )
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


def _config_to_save(config: LlamaConfig) -> dict[str, Any]:
    """The fields that say something; transformers would add dozens of defaults."""
    values = config.to_dict()
    chosen = {name: values[name] for name in SAVED_CONFIG_FIELDS}
    rope_theta = values["rope_parameters"]["rope_theta"]  # where readers of older configs look for it
    return chosen | {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "rope_theta": rope_theta}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in demonstration model of RayLLM.")
    parser.add_argument("--output", type=Path, default=model_path(), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="number of optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=NUM_THREADS, help="more threads give other rounding")
    options = parser.parse_args()
    model, tokenizer = train(options.steps, options.seed, options.threads)
    save_checkpoint(model, tokenizer, options.output)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
