"""Checkpoints of random weights in real shapes, made on the spot, so that two backends can be timed on one model."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError, did_you_mean

PREFIX = "random:"
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "llama-160m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def random_model(name: str, *, with_weights: bool, cache: Path | None = None) -> Path:
    """The folder of `random:SHAPE` (config, tokenizer and, where asked for, bfloat16 weights); made once, then kept.

    Raises `ConfigError` for an unknown shape.
    """
    shape = name.removeprefix(PREFIX).removesuffix("-shape")
    if shape not in SHAPES:
        raise ConfigError(f"unknown random model {name!r}{did_you_mean(shape, SHAPES)} (known: {', '.join(SHAPES)})")
    folder = (cache or Path.home() / ".cache" / "rayllm" / "random") / shape / ("full" if with_weights else "dummy")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        _write(unfinished, {**_COMMON, **SHAPES[shape]}, with_weights)
        unfinished.replace(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(folder: Path, fields: dict[str, Any], with_weights: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = AutoConfig.for_model(**fields)
    config.dtype = torch.bfloat16
    if with_weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    else:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
    _write_tokenizer(folder, fields["vocab_size"])


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words `t0 t1 ...`, one a token: benchmarks speak ids, but a model folder has a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *(f"t{i}" for i in range(len(special), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
