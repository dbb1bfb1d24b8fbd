from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import check_bfloat16, check_log_probs, make_sequences, transformers_log_probs
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from rayllm.errors import ConfigError
from rayllm.models.architectures import baichuan

VOCAB_SIZE_OF_2 = 125_696
SIX_HEADS: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}


def as_baichuan(llama: Path, folder: Path, *, rotary: bool, architecture: str = "BaichuanForCausalLM") -> Path:
    """The Llama of a folder in Baichuan's layout, of the 7B models or the 13B ones."""
    config = json.loads((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        parts = [tensors.pop(f"{prefix}.{part}_proj.weight") for part in "qkv"]
        tensors[f"{prefix}.W_pack.weight"] = torch.cat(parts)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    kept = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
    published = {name: config[name] for name in (*kept, "rms_norm_eps", "hidden_act")}
    published |= {"architectures": [architecture], "model_type": "baichuan", "torch_dtype": "float32"}
    published["max_position_embeddings" if rotary else "model_max_length"] = 512
    (folder / "config.json").write_text(json.dumps(published))
    return folder


@torch.no_grad()
def alibi_log_probs(llama: Path, sequences: list[list[int]], dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """The Llama of a folder by `transformers`, with all tokens at position 0, where nothing is turned, and a mask that
    has Bloom's slopes times the distance."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, attn_implementation="eager").eval()
    num_heads = model.config.num_attention_heads
    slopes_H = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    found = []
    for tokens in sequences:
        places = torch.arange(len(tokens))
        distances = (places - places[:, None]).float()
        mask = slopes_H[:, None, None] * distances.masked_fill(distances > 0, float("-inf"))
        logits = model(
            torch.tensor([tokens]),
            position_ids=torch.zeros(1, len(tokens), dtype=torch.long),
            attention_mask=mask[None].to(dtype),
        ).logits
        found.append(logits[0].float().log_softmax(-1).numpy())
    return found


@pytest.mark.parametrize("architecture", ["BaiChuanForCausalLM", "BaichuanForCausalLM"])
def test_rotary_models_equal_llama_with_the_same_weights(
    architecture: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    llama = make_checkpoint(tmp_path / "llama", tokenizer=False, num_key_value_heads=4)
    path = as_baichuan(llama, tmp_path / "baichuan", rotary=True, architecture=architecture)
    sequences = make_sequences(288)
    expected = transformers_log_probs(llama, sequences)
    check_log_probs(path, sequences, expected, two_ranks)
    check_bfloat16(path, sequences, expected, reference=llama)


def test_alibi_models_equal_llama_with_biased_scores(tmp_path: Path, two_ranks: RankPool) -> None:
    llama = make_checkpoint(tmp_path / "llama", tokenizer=False, **SIX_HEADS)
    path = as_baichuan(llama, tmp_path / "baichuan", rotary=False)
    sequences = make_sequences(288)
    expected = alibi_log_probs(llama, sequences)
    assert np.abs(expected[0] - transformers_log_probs(llama, sequences)[0]).max() > 0.1
    check_log_probs(path, sequences, expected, two_ranks)
    check_bfloat16(path, sequences, expected, reference=alibi_log_probs(llama, sequences, torch.bfloat16))


def test_the_head_of_version_2_has_rows_of_length_one(tmp_path: Path, two_ranks: RankPool) -> None:
    llama = make_checkpoint(tmp_path / "llama", tokenizer=False, num_key_value_heads=4, vocab_size=VOCAB_SIZE_OF_2)
    path = as_baichuan(llama, tmp_path / "baichuan", rotary=True)
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] /= tensors["lm_head.weight"].norm(dim=1, keepdim=True)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    sequences = make_sequences(VOCAB_SIZE_OF_2, (9, 5))
    check_log_probs(path, sequences, transformers_log_probs(llama, sequences), two_ranks)


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12, 32, 40])
def test_slopes_are_those_of_bloom(num_heads: int) -> None:
    bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    assert baichuan.alibi_slopes(num_heads) == pytest.approx(bloom.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "rotary"),
    [
        ({"hidden_size": 4096, "num_attention_heads": 32}, True),
        ({"hidden_size": 5120, "num_attention_heads": 40}, False),
        ({"max_position_embeddings": 100}, True),
        ({"model_max_length": 100}, False),
    ],
    ids=str,
)
def test_positions_are_rotary_in_the_7b_models_and_alibi_in_the_13b_ones(fields: dict[str, Any], rotary: bool) -> None:
    spec = baichuan.spec({**CONFIG, **fields})
    attention = spec.layers[0].attention
    assert (attention.rope is not None, not attention.alibi_slopes) == (rotary, rotary)
    assert spec.max_model_len == (4096 if "hidden_size" in fields else 100)
    assert attention.num_kv_heads == attention.num_heads


def test_a_tied_head_that_is_normalized_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=True is not supported with vocab_size=125696"):
        baichuan.spec({**CONFIG, "vocab_size": VOCAB_SIZE_OF_2, "tie_word_embeddings": True})
