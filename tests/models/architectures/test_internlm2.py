from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from golden import check_bfloat16, check_log_probs, make_sequences, transformers_log_probs
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from safetensors.torch import load_file, save_file
from text.tokenizers_made import make_sentencepiece_model
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

import rayllm
from rayllm.models.architectures import internlm2
from rayllm.models.registry import spec_of

RENAMED = {
    "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
"""Llama's names, and InternLM2's."""


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Rows of a key/value head's queries, its key and its value, head by head."""
    parts = [part.view(num_kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def as_internlm2(llama: Path, folder: Path, **fields: Any) -> Path:
    """The Llama of a folder in InternLM2's layout."""
    config = json.loads((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            names = [f"model.layers.{layer}.self_attn.{part}_proj.{leaf}" for part in "qkv"]
            if names[0] in tensors:
                q, k, v = (tensors.pop(name) for name in names)
                fused = _fused(q, k, v, config["num_key_value_heads"])
                tensors[f"model.layers.{layer}.attention.wqkv.{leaf}"] = fused
    for old, new in RENAMED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
    kept = (*kept, "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act")
    published = {name: config[name] for name in kept if name in config}
    published |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**published, **fields}))
    return folder


@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_equal_those_of_llama_with_the_same_weights(
    bias: bool, tmp_path: Path, two_ranks: RankPool
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    llama = make_checkpoint(tmp_path / "llama", tokenizer=False, attention_bias=bias, rope_parameters=rope)
    scaling = {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    path = as_internlm2(llama, tmp_path / "internlm2", bias=bias, **scaling)
    sequences = make_sequences(288)
    expected = transformers_log_probs(llama, sequences)
    check_log_probs(path, sequences, expected, two_ranks)
    check_bfloat16(path, sequences, expected, reference=llama)


def test_the_first_files_have_the_type_of_the_model_before() -> None:
    config = {**CONFIG, "architectures": ["InternLM2ForCausalLM"], "bias": False}
    for model_type in ("internlm2", "internlm"):
        assert not spec_of({**config, "model_type": model_type}).layers[0].attention.qkv_bias


def test_attention_has_biases_unless_the_config_says_no() -> None:
    attention = internlm2.spec(CONFIG).layers[0].attention
    assert (attention.qkv_bias, attention.out_bias) == (True, True)
    assert not internlm2.spec(CONFIG).layers[0].feed_forward.bias


def test_a_folder_with_sentencepiece_and_code_is_served_and_the_code_is_not_run(tmp_path: Path) -> None:
    llama = make_checkpoint(tmp_path / "llama", tokenizer=False, vocab_size=320)
    code = {"AutoConfig": "configuration_it.C", "AutoModelForCausalLM": "modeling_it.M"}
    path = as_internlm2(llama, tmp_path / "internlm2", bias=False, auto_map=code, model_type="internlm")
    make_sentencepiece_model(path)
    settings = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_it.T", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("configuration_it", "modeling_it", "tokenization_it"):
        (path / f"{name}.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    tokens = [1, *processor.encode("hello world")]
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    params = rayllm.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with rayllm.LLM(str(path), device="cpu", max_model_len=64, trust_remote_code=True) as llm:
        [output] = llm.generate(["hello world"], params, use_tqdm=False)
    assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == tokens
