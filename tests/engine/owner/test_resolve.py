from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tokenizer

from rayllm.config import EngineConfig
from rayllm.demo import DEMO_MODEL_NAME
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import ConfigError


def _config(path: Path, **fields: object) -> EngineConfig:
    config: EngineConfig = EngineConfig.parse({"model": str(path), **fields})
    return config


def test_what_the_config_leaves_open_follows_from_model_and_machine(llama_path: Path) -> None:
    resolved = resolve(_config(llama_path), num_gpus=0, num_cores=4)
    assert resolved.served_model_name == llama_path.name
    assert (resolved.device, resolved.dtype, resolved.backend) == ("cpu", "float32", "inproc")
    assert (resolved.max_model_len, resolved.block_size, resolved.num_threads) == (512, 8, 4)
    assert (resolved.shape.vocab_size, resolved.shape.eos_token_ids, resolved.shape.num_layers) == (288, (2,), 2)


def test_a_gpu_is_used_where_there_is_one(llama_path: Path) -> None:
    resolved = resolve(_config(llama_path), num_gpus=2, num_cores=4)
    assert (resolved.device, resolved.block_size, resolved.max_num_batched_tokens) == ("cuda", 64, 8192)
    assert resolve(_config(llama_path), num_gpus=0, num_cores=4).max_num_batched_tokens == 2048


def test_no_model_means_the_built_in_one() -> None:
    assert resolve(EngineConfig(), num_gpus=0, num_cores=1).served_model_name == DEMO_MODEL_NAME


def test_two_workers_are_ray_actors_and_share_the_cores(llama_path: Path) -> None:
    resolved = resolve(_config(llama_path, tensor_parallel_size=2), num_gpus=0, num_cores=2)
    assert (resolved.backend, resolved.num_threads) == ("ray", 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor_parallel_size": 4}, ["tensor_parallel_size=4", "this machine has 2", "at most 2"]),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "inproc"}, ["tensor_parallel_size=2", "'ray'"]),
        ({"max_model_len": 513}, ["513", "512"]),
        ({"num_kv_blocks": 10}, ["num_kv_blocks=10", "256"]),
        ({"num_kv_blocks": 10, "max_model_len": 300}, ["num_kv_blocks=10", "max_model_len=300"]),
        ({"device": "cuda"}, ["cuda", "no NVIDIA GPU"]),
        ({"tokenizer": "/not/there"}, ["/not/there"]),
        ({"model": "/not/there"}, ["/not/there", "does not exist"]),
    ],
)
def test_what_cannot_work_is_refused_with_value_limit_and_mend(
    llama_path: Path, fields: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineConfig.parse({"model": str(llama_path), **fields}), num_gpus=0, num_cores=2)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_heads_that_do_not_divide_are_refused(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=4"):
        resolve(_config(llama_path, tensor_parallel_size=3), num_gpus=0, num_cores=8)


def test_end_of_sequence_ids_may_stand_with_the_text_part(tmp_path: Path) -> None:
    text = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
        "num_hidden_layers": 2, "vocab_size": 288, "eos_token_id": [1, 106],
    }  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "dtype": "float32", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer(tmp_path)
    resolved = resolve(_config(tmp_path, load_format="dummy", max_model_len=64), num_gpus=0, num_cores=2)
    assert resolved.shape.eos_token_ids == (2, 1, 106)


def test_an_end_of_sequence_id_outside_the_vocabulary_is_refused(llama_path: Path, tmp_path: Path) -> None:
    for file in llama_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5000]}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        resolve(_config(tmp_path), num_gpus=0, num_cores=2)


def test_overrides_of_config_json_reach_the_spec(llama_path: Path) -> None:
    overrides = {"max_position_embeddings": 64, "rope_theta": 5e5, "eos_token_id": [7], "unknown": 1}
    resolved = resolve(_config(llama_path, hf_overrides=overrides), num_gpus=0, num_cores=1)
    plain = resolve(_config(llama_path), num_gpus=0, num_cores=1)
    assert (resolved.max_model_len, plain.max_model_len) == (64, 512)
    theta = [next(iter(config.spec.attentions())).rope.theta for config in (resolved, plain)]  # type: ignore[attr-defined]
    assert theta == [5e5, 1e4]
    assert 7 in resolved.shape.eos_token_ids
    assert 7 not in plain.shape.eos_token_ids
    assert (
        resolve(_config(llama_path, hf_overrides=json.dumps(overrides)), num_gpus=0, num_cores=1).spec == resolved.spec
    )


def test_an_override_that_the_architecture_refuses_is_named(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json with hf_overrides of hidden_size: .*hidden_size"):
        resolve(_config(llama_path, hf_overrides={"hidden_size": "wide"}), num_gpus=0, num_cores=1)
