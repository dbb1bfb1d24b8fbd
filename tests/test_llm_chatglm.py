"""ChatGLM checkpoints as people have them, from the files alone: generate, chat, stop. Their Python files would end the
program if they ran."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatglm_made import as_chatglm, make_glm
from text.tokenizers_made import make_ranks, make_sentencepiece_model

from rayllm import LLM, SamplingParams
from rayllm.config import EngineConfig
from rayllm.engine.owner.resolve import resolve

CODE = ("tokenization_chatglm", "modeling_chatglm", "configuration_chatglm")
NUM_RANKS = 302
ENDS = [NUM_RANKS, NUM_RANKS + 7, NUM_RANKS + 9]
"""<|endoftext|>, <|user|>, <|observation|>: 151329, 151336 and 151338 of the published vocabulary."""
PUBLISHED_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n{% set tools = item['tools'] %}"
    "{% for tool in tools %}## {{ tool['function']['name'] }}{% endfor %}{% endif %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""In the form of GLM-4's: tools are part of a message."""


def _with_code(folder: Path, settings: dict[str, Any]) -> Path:
    classes = [f"tokenization_chatglm.{settings['tokenizer_class']}", None]
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": classes}, **settings}))
    for name in CODE:
        (folder / f"{name}.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    return folder


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm4")
    glm = make_glm(path / "glm", vocab_size=320)
    folder = as_chatglm(glm, path / "chatglm", seq_length=4096, eos_token_id=ENDS, pad_token_id=NUM_RANKS)
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "eos_token": "<|endoftext|>"}
    return _with_code(make_ranks(folder), {**settings, "chat_template": PUBLISHED_TEMPLATE})


@pytest.fixture(scope="module")
def llm(glm4: Path) -> Iterator[LLM]:
    with LLM(model=str(glm4), tokenizer=None, max_model_len=2048, trust_remote_code=True, device="cpu") as made:
        yield made


def test_a_rendered_prompt_and_a_chat_are_the_same_tokens(llm: LLM) -> None:
    messages = [{"role": "user", "content": "你好"}]
    prompt = llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "[gMASK]<sop><|user|>\n你好<|assistant|>"
    params = SamplingParams(temperature=0.95, max_tokens=16, stop_token_ids=ENDS, seed=1)
    [generated] = llm.generate(prompts=prompt, sampling_params=params)
    [chatted] = llm.chat(messages, params)
    assert generated.prompt_token_ids[:4] == [NUM_RANKS + 2, NUM_RANKS + 4, NUM_RANKS + 7, 198]
    assert generated.prompt_token_ids == chatted.prompt_token_ids
    assert generated.outputs[0].token_ids == chatted.outputs[0].token_ids


def test_each_end_token_of_the_config_ends_and_the_turns_are_told(llm: LLM) -> None:
    found = set()
    for output in llm.generate(["hello"] * 48, [SamplingParams(max_tokens=512, seed=seed) for seed in range(48)]):
        [choice] = output.outputs
        assert not set(choice.token_ids[:-1]) & set(ENDS)
        if choice.finish_reason == "stop":
            last = choice.token_ids[-1]
            assert choice.stop_reason == (None if last == ENDS[0] else last)
            found.add(last)
    assert found == set(ENDS)


def test_stop_tokens_end_where_end_tokens_are_ignored(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=512, seed=seed, ignore_eos=True, stop_token_ids=[ENDS[1]]) for seed in range(8)]
    reasons = {output.outputs[0].stop_reason for output in llm.generate(["hello"] * 8, params)}
    assert ENDS[1] in reasons <= {ENDS[1], None}


def test_tools_are_shown_in_the_models_own_words_and_its_calls_are_read(llm: LLM) -> None:
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {"n": {"enum": [1]}}}}
    function["parameters"] |= {"required": ["n"], "additionalProperties": False}  # type: ignore[operator]
    [output] = llm.chat(
        [{"role": "user", "content": "weather?"}],
        SamplingParams(max_tokens=64, seed=1),
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
    )
    assert output.prompt is not None
    assert output.prompt.startswith("[gMASK]<sop><|system|>\n你是")
    assert "## get_weather\n\n" in output.prompt
    assert output.prompt.endswith("<|user|>\nweather?<|assistant|>")
    assert output.outputs[0].text.startswith("get_weather\n{")


def test_chatglm2_in_bin_shards_generates_chats_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    glm = make_glm(tmp_path / "glm", vocab_size=328)
    folder = as_chatglm(glm, tmp_path / "chatglm2", num_shards=3, seq_length=4096, eos_token_id=2, pad_token_id=0)
    _with_code(make_sentencepiece_model(folder), {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False})
    with (
        caplog.at_level(logging.INFO),
        LLM(model=str(folder), max_model_len=2048, trust_remote_code=True, device="cpu") as llm,
    ):
        [output] = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=4))
        assert output.prompt == "[gMASK]sop[Round 1]\n\n问：hello\n\n答："
        assert output.prompt_token_ids[:2] == [321, 323]
        assert llm.generate(output.prompt, SamplingParams(max_tokens=1))[0].prompt_token_ids == output.prompt_token_ids
        answers = llm.generate(["hello"] * 16, [SamplingParams(max_tokens=512, seed=seed) for seed in range(16)])
        assert any(answer.outputs[0].token_ids[-1] == 2 for answer in answers)
    assert caplog.text.count("trust_remote_code=True is not needed") == 1


def test_ends_are_those_of_config_json_where_no_generation_config_is(glm4: Path) -> None:
    config: EngineConfig = EngineConfig.parse({"model": str(glm4)})
    assert resolve(config, num_gpus=0, num_cores=1).shape.eos_token_ids == tuple(ENDS)
