"""Tiny random ChatGLM checkpoints in their published layout, made of the GLM of `transformers` with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import GlmConfig

NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "model.layers": "transformer.encoder.layers",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "lm_head": "transformer.output_layer",
}
"""GLM's names in `transformers`, and ChatGLM's; other parts are the same."""


def make_glm(folder: Path, *, rope_ratio: float = 1.0, vocab_size: int = 288, **fields: Any) -> Path:
    """A tiny `GlmForCausalLM`, the reference."""
    config = GlmConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4 * rope_ratio, "partial_rotary_factor": 0.5},
        pad_token_id=0,
        eos_token_id=1,
        **fields,
    )
    return make_checkpoint(folder, config, tokenizer=False)


def as_chatglm(glm: Path, folder: Path, *, num_shards: int = 0, **fields: Any) -> Path:
    """The GLM of a folder as ChatGLM's checkpoint: one safetensors file, or `num_shards` of PyTorch's with an index."""
    config = json.loads((glm / "config.json").read_text())
    tensors = {_name(name): tensor for name, tensor in _fused(load_file(glm / "model.safetensors")).items()}
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards:
        _save_shards(tensors, folder, num_shards)
    else:
        save_file(tensors, folder / "model.safetensors")
    published = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "ffn_hidden_size": config["intermediate_size"],
        "padded_vocab_size": config["vocab_size"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 1e4,
        "add_qkv_bias": config["attention_bias"],
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**published, **fields}))
    return folder


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    for name in tensors:
        if ".self_attn.q_proj." in name:
            parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            found[name.replace("self_attn.q_proj", "self_attention.query_key_value")] = torch.cat(parts)
    return found


def _name(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path, num_shards: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        torch.save({name: tensors[name] for name in names[shard::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
