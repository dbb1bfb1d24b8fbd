"""Sampling defaults from generation_config.json and from the operator, for server and `LLM`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_checkpoint

from rayllm import LLM, AsyncLLM, SamplingParams
from rayllm.config import EngineConfig, GenerationDefaults
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import ConfigError

IN_FILE = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": None,
    "repetition_penalty": 1.05,
    "max_new_tokens": 7,
    "do_sample": True,
    "transformers_version": "5.0.0",
}
FROM_FILE = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("model"))
    (path / "generation_config.json").write_text(json.dumps(IN_FILE))
    return path


def _defaults(model: Path, **fields: Any) -> GenerationDefaults:
    config: EngineConfig = EngineConfig.parse({"model": str(model), **fields})
    return resolve(config, num_gpus=0, num_cores=1).generation


def test_auto_reads_the_models_file(model: Path) -> None:
    found = _defaults(model)

    assert found.sampling_fields() == FROM_FILE
    assert (found.max_tokens, found.max_tokens_limit) == (7, None)
    assert found.described() == (
        f"temperature 0.6, top_p 0.9, top_k 20, repetition_penalty 1.05, max_tokens 7 ({model}/generation_config.json)"
    )


def test_vllm_means_no_defaults(model: Path) -> None:
    assert _defaults(model, generation_config="vllm") == GenerationDefaults()
    assert _defaults(model, generation_config="vllm").described() == ""


def test_a_folder_takes_the_place_of_the_models_and_bounds_requests(model: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0, "max_new_tokens": 9}))

    found = _defaults(model, generation_config=str(tmp_path))

    assert found.sampling_fields() == {"temperature": 0}
    assert (found.max_tokens, found.max_tokens_limit) == (9, 9)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=rf"generation_config='{tmp_path}'.*does not exist.*auto.*vllm"):
        _defaults(model, generation_config=str(tmp_path))


@pytest.mark.parametrize("as_text", [False, True])
def test_overrides_win_and_null_takes_a_default_away(model: Path, as_text: bool) -> None:
    overrides: Any = {"temperature": 0.1, "top_k": None, "max_new_tokens": 3}

    found = _defaults(model, override_generation_config=json.dumps(overrides) if as_text else overrides)

    assert found.sampling_fields() == {"temperature": 0.1, "top_p": 0.9, "repetition_penalty": 1.05}
    assert (found.max_tokens, found.max_tokens_limit) == (3, 3)
    assert "override_generation_config" in found.described()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -7),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1]),
        ("max_new_tokens", 0),
        ("max_new_tokens", "many"),
    ],
)
def test_nonsense_names_the_file_and_the_field(model: Path, tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))

    with pytest.raises(ConfigError, match=rf"{tmp_path}/generation_config\.json: {name}.*--generation-config vllm"):
        _defaults(model, generation_config=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"override_generation_config: {name}"):
        _defaults(model, override_generation_config={name: value})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("temperature=1", "JSON object"),
        ("[1]", "JSON object"),
        ([1], "JSON object"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_tokens": 1}, "known are temperature"),
    ],
)
def test_overrides_that_are_no_fields_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig.parse({"override_generation_config": value})


def test_a_broken_file_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        _defaults(model, generation_config=str(tmp_path))


async def test_a_call_without_parameters_takes_the_models(model: Path) -> None:
    expected = SamplingParams(**FROM_FILE, max_tokens=7)
    with LLM(str(model), device="cpu") as llm:
        assert llm.get_default_sampling_params() == expected
        [by_default], [explicit] = llm.generate("hello"), llm.generate("hello", SamplingParams(max_tokens=9))
        assert len(by_default.outputs[0].token_ids) <= 7
        assert by_default.outputs[0].finish_reason == "length" or len(by_default.outputs[0].token_ids) < 7
        assert explicit.outputs[0].finish_reason == "stop" or len(explicit.outputs[0].token_ids) == 9
        assert sum(len(part.token_ids) for part in llm.stream("hello")) <= 7
    llm = AsyncLLM(str(model), device="cpu", override_generation_config={"max_new_tokens": 2, "temperature": 0})
    try:
        assert llm.get_default_sampling_params() == SamplingParams(**{**FROM_FILE, "temperature": 0}, max_tokens=2)
        async for output in llm.generate("hello"):
            assert len(output.outputs[0].token_ids) <= 2
    finally:
        await llm.close()


def test_a_call_without_parameters_and_a_model_without_a_file_is_vllms(llama_path: Path) -> None:
    with LLM(str(llama_path), device="cpu", generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
