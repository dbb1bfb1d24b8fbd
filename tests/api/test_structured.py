"""The fields that bind an answer's text: what becomes of each, and what is said of those that are wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api.fake_engine import EOS_ID, VOCAB_SIZE, FakeEngine, config
from api.streams import whole_of

from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.service import ModelService
from rayllm.api.vllm.generate import open_generate
from rayllm.errors import STRUCTURED_OUTPUTS_FAILED, RequestError
from rayllm.messages import Finish
from rayllm.parsing.reasoning import REASONING_FORMATS
from rayllm.parsing.tool_grammar import GrammarWriter, Thinking
from rayllm.request import StructuredOutputsParams as Structured
from rayllm.structured.grammar import rule_of
from rayllm.structured.matcher import new_matcher
from rayllm.structured.trial import GrammarTrials
from rayllm.structured.vocabulary import Vocabulary
from rayllm.text.tokenizer import Tokenizer

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'
Open = Callable[[dict[str, Any], ModelService], Awaitable[Any]]


@pytest.fixture(scope="module")
def grammars(tokenizer_path: Path) -> Iterator[GrammarTrials]:
    trials = GrammarTrials(str(tokenizer_path), VOCAB_SIZE, (EOS_ID,))
    yield trials
    trials.close()


@pytest.fixture
def service(engine: FakeEngine, tokenizer: Tokenizer, grammars: GrammarTrials) -> ModelService:
    service = ModelService(grammars=grammars)
    service.set_ready(config(), tokenizer, engine)
    return service


async def asked(
    service: ModelService, engine: FakeEngine, opened: Open = open_chat, **fields: Any
) -> Structured | None:
    """What the engine is asked for."""
    base = MESSAGES if opened is open_chat else {"prompt": "hi"}
    await whole_of(await opened({"model": "tiny", **base, **fields}, service))
    return engine.requests[-1].params.structured_outputs


def json_schema(**members: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, **members}}


@pytest.mark.parametrize("opened", [open_chat, open_completion, open_generate])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": json_schema()}, Structured(json=SCHEMA_TEXT)),
        ({"response_format": json_schema(strict=True, description="x")}, Structured(json=SCHEMA_TEXT)),
        ({"response_format": {"type": "json_object"}}, Structured(json_object=True)),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None}, None),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
         Structured(json=SCHEMA_TEXT, disable_any_whitespace=True)),
        ({"structured_outputs": {"json_object": True, "regex": None}}, Structured(json_object=True)),
        ({"structured_outputs": {"regex": "a+"}}, Structured(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Structured(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Structured(grammar='start: "a"')),
        ({"guided_json": SCHEMA}, Structured(json=SCHEMA_TEXT)),
        ({"guided_json": SCHEMA_TEXT}, Structured(json=SCHEMA_TEXT)),
        ({"guided_regex": "a+"}, Structured(regex="a+")),
        ({"guided_choice": ["a", "b"]}, Structured(choice=("a", "b"))),
        ({"guided_grammar": 'start: "a"'}, Structured(grammar='start: "a"')),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
async def test_every_field_becomes_what_the_engine_follows(
    service: ModelService, engine: FakeEngine, opened: Open, fields: dict[str, Any], expected: Structured | None
) -> None:
    assert await asked(service, engine, opened, **fields) == expected


@pytest.mark.parametrize("field", ["response_format", "structured_outputs"])
async def test_structural_tags(service: ModelService, engine: FakeEngine, field: str) -> None:
    tags = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
    value = {"type": "structural_tag", **tags} if field == "response_format" else {"structural_tag": tags}
    structured = await asked(service, engine, **{field: value})
    assert structured is not None
    assert structured.grammar is not None
    assert '"<f"' in structured.grammar


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_objekt"}}, "response_format", "did you mean 'json_object'"),
        ({"response_format": {}}, "response_format", "type must be one of text, json_object"),
        ({"response_format": "json"}, "response_format", "valid dictionary"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "unknown member 'schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be an object"),
        ({"response_format": json_schema(name=None)}, "response_format", "name must be 1 to 64"),
        ({"response_format": json_schema(name="a b")}, "response_format", "got 'a b'"),
        ({"response_format": json_schema(strict="yes")}, "response_format", "strict must be true or false"),
        ({"response_format": json_schema(description=3)}, "response_format", "description must be text"),
        ({"response_format": json_schema(schema="x")}, "response_format", "schema must be an object"),
        ({"response_format": json_schema(schemas={})}, "response_format", "did you mean 'schema'"),
        ({"response_format": json_schema(schema={"type": "stsring"})}, "response_format", "Invalid type: stsring"),
        (
            {"structured_outputs": {}},
            "structured_outputs",
            "^structured_outputs: nothing given; give exactly one of json",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice given"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "did you mean 'regex'"),
        ({"structured_outputs": {"regex": "((("}}, "structured_outputs", "unclosed group"),
        ({"guided_json": "{"}, "guided_json", "not a JSON schema"),
        ({"guided_json": 3}, "guided_json", "guided_json"),
        ({"guided_regex": "x{99999999}"}, "guided_regex", "at most 10000"),
        ({"guided_regex": ""}, "guided_regex", "at least one character"),
        ({"guided_choice": []}, "guided_choice", "at least one text"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "list of texts"),
        ({"guided_grammar": "x"}, "guided_grammar", "neither Lark"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json is given too"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "response_format is given"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_a_wrong_field_is_refused_with_its_name_and_the_reason(
    service: ModelService, engine: FakeEngine, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        await asked(service, engine, **fields)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert not engine.requests


@pytest.mark.parametrize(
    ("structured", "answer", "wrong"),
    [
        (Structured(json=SCHEMA), '{"b": 1, "a": "x"}', "{]"),
        (Structured(regex="[0-9]/x"), "7/x", "x"),
        (Structured(choice=("a/b", "c.d")), "c.d", "cxd"),
    ],
)
@pytest.mark.parametrize(("thinking", "before"), [(Thinking.OPEN, "hm {]</think>\n"), (Thinking.POSSIBLE, "")])
def test_what_binds_the_answer_begins_after_its_reasoning(
    tokenizer_path: Path, structured: Structured, answer: str, wrong: str, thinking: Thinking, before: str
) -> None:
    rule = rule_of(structured)
    assert rule is not None
    lark = GrammarWriter({}).after_reasoning(rule, REASONING_FORMATS["qwen3"], thinking)
    vocabulary = Vocabulary.load(str(tokenizer_path), VOCAB_SIZE, (EOS_ID,))
    for text, follows in ((before + answer, True), (before + wrong, False)):
        matcher = new_matcher(Structured(grammar=lark), vocabulary)
        token_ids = vocabulary.tokenizer.tokenize_str(text)
        whole = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
        assert whole == follows, text


async def test_a_grammar_that_fails_in_the_engine_is_the_clients_fault(
    service: ModelService, engine: FakeEngine
) -> None:
    engine.error = Finish("error", code=STRUCTURED_OUTPUTS_FAILED, message="structured output: too many items")
    with pytest.raises(RequestError, match="too many items") as caught:
        await asked(service, engine, guided_regex="a")
    assert caught.value.param == "structured_outputs"
