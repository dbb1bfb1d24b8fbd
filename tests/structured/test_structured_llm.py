"""Answers of random models that must follow a grammar: whatever the model wants, the text parses and validates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rayllm import LLM, SamplingParams
from rayllm import StructuredOutputsParams as Structured
from rayllm.errors import EngineError, RequestError
from rayllm.request import CompletionOutput

PROMPT = [5, 6, 7]
SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"const": "yes"}, {"type": "integer", "minimum": 10, "maximum": 99}]},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"enum": [1, 2]},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "number", "minimum": -1.5, "maximum": 2.5},
    {
        "type": "object",
        "properties": {"é": {"const": "ü"}, 'q"': {"enum": ["\n", "\\"]}},
        "required": ["é", 'q"'],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def llm(llama_path: Path) -> Iterator[LLM]:
    with LLM(str(llama_path), device="cpu", max_model_len=400, num_kv_blocks=400) as llm:
        yield llm


def _choices(llm: LLM, structured: Structured | None, **params: Any) -> list[CompletionOutput]:
    params = {"max_tokens": 300, "seed": 3, **params}
    (output,) = llm.generate([PROMPT], SamplingParams(structured_outputs=structured, **params), use_tqdm=False)
    return output.outputs


@pytest.mark.parametrize("drawn", [{"seed": 3, "n": 2}, {"temperature": 0.0, "repetition_penalty": 1.2}], ids=str)
def test_every_answer_validates_against_its_schema(llm: LLM, drawn: dict[str, Any]) -> None:
    params = [SamplingParams(structured_outputs=Structured(json=schema), max_tokens=300, **drawn) for schema in SCHEMAS]
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        for choice in output.outputs:
            assert choice.finish_reason == "stop", choice.text
            jsonschema.validate(json.loads(choice.text), schema)


def test_json_object_is_any_object(llm: LLM) -> None:
    choices = _choices(llm, Structured(json_object=True), n=4, logit_bias={95: 5.0})
    whole = [choice for choice in choices if choice.finish_reason == "stop"]
    assert whole
    assert all(isinstance(json.loads(choice.text), dict) for choice in whole)


def test_json_has_little_whitespace_even_of_a_model_that_wants_nothing_else(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    spaces = {token_id: 100.0 for token_id in range(288) if llm.get_tokenizer().token_text(token_id).isspace()}
    (choice,) = _choices(llm, Structured(json=schema), logit_bias=spaces)
    assert choice.finish_reason == "stop"
    assert json.loads(choice.text) == {"a": 1}
    assert max(map(len, re.findall(r"\s+", choice.text))) > 4
    (choice,) = _choices(llm, Structured(json=schema, disable_any_whitespace=True), logit_bias=spaces)
    assert choice.text == '{"a":1}'


def test_a_regex_matches_the_whole_text(llm: LLM) -> None:
    regexes = [r"[a-z]{3}[0-9]{2}", r"(ja|nein|yes!){1,3}", r"\d{4}/\w{2}", r"[^\x00-\x7f]{2}", "a*b"]
    params = [
        SamplingParams(structured_outputs=Structured(regex=regex), n=3, seed=1, max_tokens=99) for regex in regexes
    ]
    for regex, output in zip(regexes, llm.generate([PROMPT] * len(params), params, use_tqdm=False), strict=True):
        for choice in output.outputs:
            assert choice.finish_reason == "stop"
            assert re.fullmatch(regex, choice.text, re.ASCII), choice.text


def test_a_choice_is_one_of_its_texts_to_the_letter(llm: LLM) -> None:
    texts = ("yes", "no.", "(a|b)*", "tab\tand \\d ü", "{}&~#- /", "yes, but")
    found = {
        choice.text
        for seed in range(3)
        for choice in _choices(llm, Structured(choice=texts), n=8, seed=seed, temperature=9.0)
    }
    assert found <= set(texts)
    assert len(found) > 3


@pytest.mark.parametrize(
    "grammar", ['root ::= "<" item* ">"\nitem ::= [a-c] | "12"', 'start: "<" item* ">"\nitem: /[a-c]/ | "12"']
)
def test_a_grammar_may_be_gbnf_or_lark(llm: LLM, grammar: str) -> None:
    for choice in _choices(llm, Structured(grammar=grammar), n=3):
        assert re.fullmatch("<([a-c]|12)*>", choice.text)


def test_tags_open_a_schema_in_free_text(llm: LLM) -> None:
    tag = {"begin": "<n>", "schema": {"type": "integer", "minimum": 1, "maximum": 9}, "end": "</n>"}
    structured = Structured(structural_tag={"structures": [tag], "triggers": ["<n"]})
    less_n = llm.get_tokenizer().encode("<n", add_special_tokens=False)
    (choice,) = _choices(llm, structured, logit_bias=dict.fromkeys(less_n, 20.0), max_tokens=40)
    assert re.search(r"<n>[1-9]</n>", choice.text)


def test_the_text_may_be_cut_by_max_tokens_and_by_a_stop_string(llm: LLM) -> None:
    (choice,) = _choices(llm, Structured(regex="[a-z]{50}"), max_tokens=4)
    assert choice.finish_reason == "length"
    assert len(choice.token_ids) == 4
    (choice,) = _choices(llm, Structured(regex="[a-f]{50}"), stop=["a", "b"])
    assert choice.finish_reason == "stop"
    assert choice.stop_reason in ("a", "b")


def test_an_answer_that_is_complete_with_its_last_token_stopped(llm: LLM) -> None:
    (choice,) = _choices(llm, Structured(regex="abc"), max_tokens=len(llm.get_tokenizer().encode("abc")))
    assert (choice.text, choice.finish_reason) == ("abc", "stop")


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 40}, {"ignore_eos": True, "min_tokens": 40}])
def test_it_ends_with_its_grammar_whatever_the_request_says_of_ends(llm: LLM, params: dict[str, Any]) -> None:
    for regex in ("ab?c", "x{3}", "a|abb"):
        (choice,) = _choices(llm, Structured(regex=regex), **params)
        assert choice.finish_reason == "stop"
        assert re.fullmatch(regex, choice.text)


def test_ignore_eos_goes_on_as_long_as_the_grammar_allows(llm: LLM) -> None:
    (choice,) = _choices(llm, Structured(regex="[ab]*"), ignore_eos=True, max_tokens=30)
    assert choice.finish_reason == "length"
    assert re.fullmatch("[ab]{30,}", choice.text)


def test_a_model_without_an_end_of_text_ends_with_the_grammar(tmp_path: Path) -> None:
    from tiny import make_checkpoint

    path = make_checkpoint(tmp_path, eos_token_id=None, vocab_size=300)
    (path / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with LLM(str(path), device="cpu", max_model_len=64) as llm:
        assert llm.config.shape.eos_token_ids == ()
        (choice,) = _choices(llm, Structured(regex="(ab){4}"), max_tokens=40)
        assert (choice.text, choice.finish_reason) == ("abababab", "stop")
        (choice,) = _choices(llm, Structured(regex="[ab]*"), max_tokens=20)
        assert choice.finish_reason == "length"


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    (bound,) = _choices(llm, Structured(choice=("q",)), logprobs=20)
    (free,) = _choices(llm, None, logprobs=20, max_tokens=1)
    assert bound.logprobs is not None
    assert free.logprobs is not None
    (token_id,) = bound.token_ids
    first = {i: entry.logprob for i, entry in bound.logprobs[0].items() if i != token_id}
    assert first.items() <= {i: entry.logprob for i, entry in free.logprobs[0].items()}.items()
    assert bound.logprobs[0][token_id].logprob < -0.01


def test_a_request_that_leaves_no_token_fails_alone(llm: LLM) -> None:
    params = [
        SamplingParams(structured_outputs=Structured(regex="abc"), allowed_token_ids=(40, 41)),
        SamplingParams(structured_outputs=Structured(regex="abc")),
    ]
    failed, sound = llm.generate([PROMPT] * 2, params, use_tqdm=False)
    assert failed.outputs[0].error is not None
    assert "constraints leave no token" in failed.outputs[0].error.message
    assert sound.outputs[0].text == "abc"
    with pytest.raises(EngineError, match="constraints leave no token"):
        llm.generate([PROMPT], params[0], use_tqdm=False)


def test_what_is_no_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    for structured in (Structured(regex="((("), Structured(json={"type": "stsring"}), Structured(grammar="x")):
        with pytest.raises(RequestError):
            _choices(llm, structured)


def test_streamed_text_is_the_same(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=Structured(json=SCHEMAS[0]), max_tokens=300, seed=3)
    assert (
        "".join(delta.text for delta in llm.stream(PROMPT, params))
        == _choices(llm, Structured(json=SCHEMAS[0]))[0].text
    )
