from __future__ import annotations

from pathlib import Path

from golden import check_against_transformers
from models.architectures.test_glm import TINY
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from tiny import make_checkpoint
from transformers import Glm4Config

from rayllm.models.architectures import glm, glm4


def test_log_probabilities_equal_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(make_checkpoint(tmp_path, Glm4Config(**TINY), tokenizer=False), two_ranks)


def test_branches_have_norms_on_their_outputs_and_the_rest_is_glm() -> None:
    spec = glm4.spec(CONFIG)
    assert spec.architecture == "Glm4ForCausalLM"
    assert {layer.norm_placement for layer in spec.layers} == {"input_and_output"}
    assert [layer.attention for layer in spec.layers] == [layer.attention for layer in glm.spec(CONFIG).layers]
