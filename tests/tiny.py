"""Tiny random checkpoints of every architecture, with a tokenizer, made on the spot by `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
MIN_VOCAB_SIZE = 259
"""Three special tokens and 256 bytes."""

_CORPUS = [
    "The ingress speaks text, the driver plans tokens, the worker computes tensors.",
    "Once upon a time there was a small engine that never lost a request.",
    "user assistant system hello world, how are you today? 0123456789",
    "the of and to in is that it was for on are with as his they at be this have from",
] * 4

_COMMON: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": START_ID,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
}
_GATED: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {name: value for name, value in _GATED.items() if name != "head_dim"}),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 32}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def make_config(architecture: str = "llama", **overrides: Any) -> Any:
    """The `transformers` config of a tiny model; `overrides` are fields of that config."""
    import transformers

    class_name, fields = _ARCHITECTURES[architecture]
    return getattr(transformers, class_name)(**{**_COMMON, **fields, **overrides})


def make_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The `transformers` model of a config in eval mode, its weights spread so that logits are not flat."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                noise *= 1.5 / weight.shape[1] ** 0.5
            else:
                noise = noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            weight.copy_(noise)
    return model


def make_tokenizer(path: Path, vocab_size: int = 288) -> Path:
    """Trains a byte-level BPE of `vocab_size` tokens and saves it with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} is less than {MIN_VOCAB_SIZE}, what the tokenizer needs")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(path)
    return path


def make_checkpoint(
    path: Path | str,
    architecture: str | Any = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes config.json, model.safetensors and a tokenizer into `path` and returns it.

    `architecture` is one of `ARCHITECTURES`, or a config of `transformers`. `overrides` are fields of the former's
    config (`num_hidden_layers=4`, `vocab_size=263`). A small
    `max_shard_size` ("40KB") gives several files and an index.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = make_config(architecture, **overrides) if isinstance(architecture, str) else architecture
    model = make_model(config, seed=seed, dtype=dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer(path, min(config.vocab_size, 288))
    return path
