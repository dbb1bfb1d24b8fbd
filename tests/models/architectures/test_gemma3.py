from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers, make_sequences, transformers_log_probs
from models.architectures.test_gemma import TINY as GEMMA
from ranks import RankPool
from safetensors.torch import load_file, save_file
from teacher import load, log_probs
from tiny import make_checkpoint
from transformers import Gemma3Config, Gemma3TextConfig

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import gemma3
from rayllm.spec import RopeSpec

TINY: dict[str, Any] = {
    **GEMMA, "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 12,
    "sliding_window_pattern": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}


def make_image_model(path: Path) -> Path:
    config = Gemma3Config(text_config=TINY, vision_config=VISION, mm_tokens_per_image=4, image_token_index=287)
    return make_checkpoint(path, config, tokenizer=False)


def test_log_probabilities_equal_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    config = Gemma3TextConfig(**TINY, rope_parameters=ROPES, final_logit_softcapping=3.0)
    check_against_transformers(make_checkpoint(tmp_path, config, tokenizer=False), two_ranks)


def test_the_text_part_of_a_model_that_sees_images_equals_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(make_image_model(tmp_path), two_ranks)


def test_tensors_that_are_left_out_are_told_once_whatever_the_number_of_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_image_model(tmp_path)
    with caplog.at_level(logging.INFO, logger="rayllm.weights"):
        for rank in range(2):
            load(TensorParallel(rank, 2), path)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "tensors are left out, since what they serve is not supported: vision_tower.*, multi_modal_projector.*"
    )


def test_the_names_of_a_model_that_sees_images_may_have_either_prefix(tmp_path: Path) -> None:
    path = make_image_model(tmp_path)
    sequences = make_sequences(288, (25,))
    before = log_probs(load(TensorParallel(), path), sequences, [25], 4)
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace("language_model.model.", "model.language_model."): tensors[name] for name in tensors}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    after = log_probs(load(TensorParallel(), path), sequences, [25], 4)
    assert all(a.equal(b) for a, b in zip(before, after))


def test_the_older_fields_of_rotation_mean_the_same_as_transformers_says(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, Gemma3TextConfig(**TINY, rope_parameters=ROPES), tokenizer=False)
    file = path / "config.json"
    older = {
        **{name: value for name, value in json.loads(file.read_text()).items() if name != "rope_parameters"},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 500.0,
        "rope_local_base_freq": 10.0,
    }
    spec = gemma3.spec(json.loads(file.read_text()))
    assert gemma3.spec(older) == spec
    sequences = make_sequences(288, (25,))
    expected = transformers_log_probs(path, sequences)
    file.write_text(json.dumps(older))
    assert abs(transformers_log_probs(path, sequences)[0] - expected[0]).max() < 1e-5


def test_defaults_are_those_of_the_config_class() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    spec = gemma3.spec({"text_config": {**text, **scaling}, "torch_dtype": "bfloat16", "model_type": "gemma3"})
    assert (spec.architecture, spec.dtype) == ("Gemma3ForConditionalGeneration", "bfloat16")
    assert (spec.vocab_size, spec.max_model_len, spec.tied_embeddings) == (262_208, 131_072, True)
    attentions = list(spec.attentions())
    assert [index for index in range(34) if attentions[index].window is None] == [5, 11, 17, 23, 29]
    assert (attentions[0].window, attentions[0].rope) == (1024, RopeSpec(10_000.0, 256))
    assert attentions[5].rope == RopeSpec(1_000_000.0, 256, "linear", factor=8.0)
    assert (attentions[0].num_heads, attentions[0].num_kv_heads, attentions[0].scale) == (8, 4, 1 / 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must be an object with full_attention and"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"text_config": 3}, "text_config=3 must be an object"),
    ],
)
def test_what_cannot_be_served_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gemma3.spec({**TINY, **fields})
