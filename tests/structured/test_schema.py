"""Schemas as generators write them are followed or refused, never followed in part without a word."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jsonschema
import llguidance
import pydantic
import pytest
import tokenizers
from pydantic import Field, TypeAdapter

from rayllm.demo import model_path
from rayllm.errors import RequestError
from rayllm.request import StructuredOutputsParams
from rayllm.structured.grammar import check_grammar, grammar_of, parser_limits, rule_of
from rayllm.structured.schema import plain_schema

_PIPELINE = tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))
_TOKENS = llguidance.LLTokenizer(_PIPELINE.to_str())


def _accepts(schema: Any, value: Any) -> bool:
    grammar = grammar_of(StructuredOutputsParams(json=schema))
    matcher = llguidance.LLMatcher(_TOKENS, grammar, limits=parser_limits())
    assert not matcher.get_error(), matcher.get_error()
    ids = _PIPELINE.encode(json.dumps(value), add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_NAMES = (
    "password path binary byte base64 base64url regex json-string int32 int64 float double file-path directory-path "
    "multi-host-uri uuid4 ipv4network ipvanyaddress iri iri-reference uri-reference uri-template json-pointer "
    "relative-json-pointer idn-email idn-hostname cuid cuid2 ulid nanoid jwt cidrv4 e164 emoji phone color decimal "
    "char currency whatever-comes-next"
)
UNKNOWN_FORMATS = _NAMES.split()
NULL = {"type": "null"}
NODE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}}

FOLLOWED: dict[str, tuple[Any, list[Any], list[Any]]] = {
    **{f"format {name}": ({"type": "string", "format": name}, ["x", ""], [1]) for name in UNKNOWN_FORMATS},
    "format of an integer": ({"type": "integer", "format": "int64"}, [5], ["5"]),
    "known format": ({"type": "string", "format": "date"}, ["2024-01-31"], ["x"]),
    "format and length": ({"type": "string", "format": "password", "minLength": 2}, ["ab"], ["a"]),
    "uniqueItems false": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, [[1, 1]], [["a"]]),
    "one unique item": ({"type": "array", "maxItems": 1, "uniqueItems": True}, [[], [1]], [[1, 2]]),
    "annotations": (
        {
            "$comment": "c", "title": "t", "description": "d", "type": "string", "default": 5, "examples": [1],
            "example": 1, "deprecated": True, "readOnly": True, "writeOnly": True, "contentEncoding": "base64",
            "contentMediaType": "text/plain", "xml": {"name": "n"}, "externalDocs": {"url": "u"}, "x-order": 1,
            "x-guidance": {"lenient": True}, "contentSchema": {"type": "object"}, "markdownDescription": "m",
        },
        ["x"],
        [1],
    ),
    "properties named as keywords": (
        _object(title={"type": "string"}, format={"type": "integer"}, default={"const": 1}, **{"x-a": NULL}),
        [{"title": "a", "format": 1, "default": 1, "x-a": None}],
        [{"title": 1, "format": 1, "default": 1, "x-a": None}, {"title": "a"}],
    ),
    "data is no schema": ({"enum": [{"title": "t", "format": "f"}]}, [{"title": "t", "format": "f"}], [{}]),
    "nullable": ({"type": "string", "nullable": True}, ["x", None], [1]),
    "not nullable": ({"type": "string", "nullable": False}, ["x"], [None]),
    "nullable enum": ({"type": "string", "enum": ["a"], "nullable": True}, ["a", None], ["b"]),
    "nullable reference": (
        {"$defs": {"E": {"enum": ["a"]}}, **_object(e={"$ref": "#/$defs/E", "nullable": True})},
        [{"e": "a"}, {"e": None}],
        [{"e": "b"}],
    ),
    "nullable root with references": (
        {"nullable": True, "$defs": {"E": {"enum": ["a"]}}, **_object(e={"$ref": "#/$defs/E"})},
        [{"e": "a"}, None],
        [{"e": None}],
    ),
    "draft 4 exclusive": ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [1], [0]),
    "draft 4 inclusive": ({"type": "integer", "maximum": 3, "exclusiveMaximum": False}, [3], [4]),
    "exclusive number": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}, [1, 2], [0, 3]),
    "int64": ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [5, -5], [0.5]),
    "safe integers": ({"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}, [5], ["a"]),
    "float32": ({"type": "number", "minimum": -3.4028235e38, "maximum": 3.4028235e38}, [1.5, 2], ["a"]),
    "float64": ({"type": "number", "maximum": 1.7976931348623157e308}, [1.5], [None]),
    "tuple of draft 7": (
        {"type": "array", "items": [{"type": "string"}, {"type": "integer"}], "additionalItems": False},
        [["a", 1]],
        [["a", 1, 2], [1]],
    ),
    "tuple of 2020-12": (
        {"type": "array", "prefixItems": [{"type": "string", "format": "path"}], "items": False, "minItems": 1},
        [["a"]],
        [["a", 1], []],
    ),
    "definitions": (
        {"definitions": {"E": {"type": "string", "format": "path"}}, **_object(e={"$ref": "#/definitions/E"})},
        [{"e": "x"}],
        [{"e": 1}],
    ),
    "OpenAPI components": (
        {"components": {"schemas": {"E": {"type": "string", "format": "byte"}}}, "$ref": "#/components/schemas/E"},
        ["x"],
        [1],
    ),
    "reference beside words": (
        {"$defs": {"E": {"enum": ["a"]}}, **_object(e={"$ref": "#/$defs/E", "description": "d", "default": "a"})},
        [{"e": "a"}],
        [{"e": "b"}],
    ),
    "allOf of one": ({"$defs": {"E": {"enum": ["a"]}}, "allOf": [{"$ref": "#/$defs/E"}], "default": 1}, ["a"], ["b"]),
    "recursion": ({"$defs": {"Node": NODE}, "$ref": "#/$defs/Node"}, [{"kids": [{"kids": []}]}], [{"kids": [1]}]),
    "$recursiveRef": (
        {"$recursiveAnchor": True, "type": "object", "properties": {"a": {"$recursiveRef": "#"}}},
        [{"a": {"a": {}}}],
        [{"a": 1}],
    ),
    "$dynamicRef": (
        {"$dynamicAnchor": "n", "type": "object", "properties": {"a": {"$dynamicRef": "#n"}}},
        [{"a": {"a": {}}}],
        [{"a": 1}],
    ),
    "reference by id": (
        {"$id": "https://x.y/z.json", "$defs": {"E": {"type": "string"}}, "$ref": "https://x.y/z.json#/$defs/E"},
        ["x"],
        [1],
    ),
    **{
        f"$schema {draft}": ({"$schema": draft, "type": "string"}, ["x"], [1])
        for draft in (
            "http://json-schema.org/draft-04/schema#",
            "http://json-schema.org/draft-06/schema#",
            "http://json-schema.org/draft-07/schema#",
            "https://json-schema.org/draft/2019-09/schema",
            "https://json-schema.org/draft/2020-12/schema",
            "https://spec.openapis.org/oas/3.1/dialect/base",
            "http://json-schema.org/schema#",
            "mine",
        )
    },
    "discriminated union": (
        {
            "oneOf": [_object(kind={"type": "string"}, a={"type": "integer"}), _object(kind={"type": "string"})],
            "discriminator": {"propertyName": "kind", "mapping": {"a": "#/x"}},
        },
        [{"kind": "k", "a": 1}, {"kind": "k"}],
        [{"kind": 1}, {}],
    ),
    "oneOf of constants": (
        {"oneOf": [_object(k={"const": "a"}), _object(k={"const": "b"})]},
        [{"k": "b"}],
        [{"k": "c"}],
    ),
    "names that are texts": (
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        [{"a": 1}],
        [{"a": "b"}],
    ),
    "names of a list": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}},
        [{"a": 1, "b": 2}, {}],
        [{"c": 1}, {"a": "x"}],
    ),
    "names of a pattern": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
        [{"ab": 1}, {}],
        [{"A": 1}, {"ab": "x"}],
    ),
    "names of a length": (
        {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "additionalProperties": True},
        [{"ab": 1}],
        [{"a": 1}, {"abcd": 1}],
    ),
    "never": (
        {"type": "object", "properties": {"a": {"not": {}}, "b": NULL}, "additionalProperties": {"not": {}}},
        [{"b": None}, {}],
        [{"a": 1}, {"c": 1}],
    ),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        [{"a": 1}],
        [{"b": 1}],
    ),
    "unevaluated of no use": ({"anyOf": [{"type": "object"}], "unevaluatedProperties": {}}, [{"b": 1}], [1]),
    "words that say nothing": (
        {
            "type": "object", "dependentRequired": {}, "dependencies": {}, "minProperties": 0, "not": False,
            "then": {"required": ["x"]}, "minContains": 2,
        },
        [{}],
        [1],
    ),
    "an if without then": ({"type": "object", "if": {"required": ["a"]}}, [{}], [1]),
    "contains none": ({"type": "array", "contains": {"type": "null"}, "minContains": 0}, [[1]], [1]),
    "any type of draft 3": (_object(a={"type": "any", "required": True}), [{"a": 1}, {"a": "x"}], [{}]),
    "zod's email": (
        {
            "type": "string",
            "format": "email",
            "pattern": "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]"
            "@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$",
        },
        ["me@example.org"],
        ["me"],
    ),
    "zod's uuid": (
        {
            "type": "string",
            "format": "uuid",
            "pattern": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
            "|00000000-0000-0000-0000-000000000000)$",
        },
        ["9491d710-3185-4e06-bea0-6a2f275345e0"],
        ["x"],
    ),
    "zod's file": (
        {"type": "string", "format": "binary", "contentEncoding": "binary", "minLength": 1},
        ["x"],
        [""],
    ),
    "alternatives told apart by an enum": (
        {
            "oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}],
            "$defs": {"C": _object(k={"enum": ["c"]}), "D": _object(k={"enum": ["d", "e"]}, x={"type": "integer"})},
        },
        [{"k": "c"}, {"k": "e", "x": 1}],
        [{"k": "d"}, {"k": "c", "x": 1}],
    ),
    "alternatives told apart by a property's type": (
        {"oneOf": [_object(v={"type": "string"}), _object(v={"type": ["integer", "null"]})]},
        [{"v": "x"}, {"v": 1}, {"v": None}],
        [{"v": True}],
    ),
    "alternatives told apart by format": (
        {"oneOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
        ["1.2.3.4", "::1"],
        ["x"],
    ),
    "lists of other values": ({"oneOf": [{"enum": ["a", 1]}, {"enum": ["b", None]}]}, ["a", 1, None], [2]),
    "Pydantic's decimal of 5 digits": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,5}|(?=[\d.]{1,6}0*$)\d*\.\d*0*$)"},
        ["1.2345", "12345", "-123.4"],
        ["123456", "123.456", ".", "-"],
    ),
    "Pydantic's decimal of 2 places": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$"},
        ["1.25", "12345", "-3.4"],
        ["1.256", "", "+"],
    ),
    "Pydantic's decimal of 10 digits and 2 places": (
        {
            "type": "string",
            "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,8}|(?=[\d.]{1,11}0*$)\d{0,8}\.\d{0,2}0*$)",
        },
        ["12345678.91", "0"],
        ["123456789", "1.234"],
    ),
    "Pydantic's decimal below one": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,0}|(?=[\d.]{1,3}0*$)\d{0,0}\.\d{0,2}0*$)"},
        ["0.25"],
        ["1.2"],
    ),
    "TypeBox's union": ({"anyOf": [{"const": "x", "type": "string"}, {"const": "y", "type": "string"}]}, ["y"], ["z"]),
    "OpenAI's strict form": (
        _object(a={"type": ["string", "null"], "description": "d"}, b={"type": "string", "enum": ["x"]}),
        [{"a": None, "b": "x"}],
        [{"a": None}, {"a": 1, "b": "x"}],
    ),
    "anything": ({}, [1, "x", None, [], {}], []),
    "true": ({"type": "object", "properties": {"a": True}}, [{"a": 1}], [1]),
    "root of annotations": ({"$schema": "mine", "title": "t"}, [1, {}], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_schema_is_followed(name: str) -> None:
    schema, good, bad = FOLLOWED[name]
    before = json.dumps(schema)

    check_grammar(StructuredOutputsParams(json=schema))
    for value in good:
        assert _accepts(schema, value), value
    for value in bad:
        assert not _accepts(schema, value), value
    rule = rule_of(StructuredOutputsParams(json=schema))  # what stands after reasoning
    assert not llguidance.LLMatcher.validate_grammar(
        f"%llguidance {{}}\nstart: body\nbody: {rule}", limits=parser_limits()
    )
    assert json.dumps(schema) == before


_NOT_OF_2020 = re.compile(r"apart by format|nullable|draft [34]|discriminated|tuple of draft 7|\$schema")


@pytest.mark.parametrize("name", [name for name in FOLLOWED if not _NOT_OF_2020.search(name)])
def test_the_examples_are_right_by_another_library(name: str) -> None:
    schema, good, _ = FOLLOWED[name]
    for value in good:
        jsonschema.Draft202012Validator(schema).validate(value)


REFUSED: dict[str, Any] = {
    "uniqueItems": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "unevaluatedProperties": {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 1}]},
    "use anyOf": {
        "oneOf": [_object(a={"type": "string"}), {**_object(a={"enum": ["x"]}), "additionalProperties": True}]
    },
    "oneOf is supported only": {"oneOf": [{"enum": [1]}, {"enum": [1.0]}]},
    "exclude each other": {"oneOf": [{"required": ["x"], "type": "object"}, {"required": ["y"], "type": "object"}]},
    "unsupported JSON schema keywords": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "nothing is fetched": {"$ref": "https://example.com/schema.json"},
    "points at nothing": {"$ref": "#/$defs/none"},
    "look-around": {"type": "string", "pattern": "^(?=a)b"},
    "type": {"type": "Date"},
    "anyOf is empty": {"enum": []},
    "which nothing follows": {"not": {}},
    "propertyNames": {"type": "object", "properties": {"a": {}}, "propertyNames": {"pattern": "^b"}},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_name(word: str) -> None:
    with pytest.raises(RequestError, match=word) as caught:
        check_grammar(StructuredOutputsParams(json=REFUSED[word]))
    assert caught.value.status == 400


def test_a_schema_inside_of_a_grammar_is_refused_without_the_lines_of_the_grammar() -> None:
    schema = json.dumps({"type": "array", "items": {"type": "string"}, "uniqueItems": True})
    grammar = f'start: call\ncall: "<tool_call>" %json {schema} "</tool_call>"'
    with pytest.raises(RequestError) as caught:
        check_grammar(StructuredOutputsParams(grammar=grammar))
    assert caught.value.message == 'grammar cannot be followed: unsupported JSON schema keywords: "uniqueItems"'


class _Color(enum.Enum):
    R = "r"
    G = "g"


class _Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class _Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class _Tree(pydantic.BaseModel):
    value: decimal.Decimal
    kids: list[_Tree] = []


class _Point(NamedTuple):
    x: int
    y: str


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (decimal.Decimal, "1.50"),
        (Annotated[decimal.Decimal, Field(ge=0)], 2),
        (dict[str, int], {"a": 1}),
        (dict[_Color, int], {"r": 1}),
        (dict[Literal["a", "b"], int], {"b": 1}),
        (dict[uuid.UUID, int], {}),
        (dict[int, str], {"1": "x"}),
        (dict[Annotated[str, Field(pattern="^a")], int], {"ab": 1}),
        (dict[Annotated[str, Field(min_length=2)], int], {"ab": 1}),
        (tuple[int, str], [1, "a"]),
        (tuple[int, ...], [1, 2]),
        (_Point, [1, "a"]),
        (datetime.date, "2024-02-03"),
        (datetime.datetime, "2024-02-03T04:05:06Z"),
        (datetime.timedelta, "P1D"),
        (pydantic.UUID4, "9491d710-3185-4e06-bea0-6a2f275345e0"),
        (pathlib.Path, "a/b"),
        (bytes, "abc"),
        (pydantic.SecretStr, "abc"),
        (pydantic.Json[list[int]], "[1]"),
        (pydantic.AnyUrl, "http://a.b/"),
        (pydantic.PostgresDsn, "postgres://u@h/d"),
        (re.Pattern, "a+"),
        (ipaddress.IPv4Address, "1.2.3.4"),
        (ipaddress.IPv6Network, "::/0"),
        (pydantic.Base64Str, "YQ=="),
        (_Color, "g"),
        (int | str | None, None),
        (Annotated[_Cat | _Dog, Field(discriminator="kind")], {"kind": "dog"}),
        (_Tree, {"value": 1, "kids": [{"value": "2"}]}),
        (pydantic.conint(gt=1, lt=9, multiple_of=2), 4),
        (pydantic.conlist(int, min_length=1, max_length=2), [1]),
        (Mapping[str, Any], {"a": [1]}),
        (Sequence[int], [1]),
        (pydantic.ByteSize, "1kb"),
        (Annotated[int, Field(title="t", examples=[1], json_schema_extra={"x-a": 1})], 1),
    ],
)
def test_what_pydantic_writes_is_followed(kind: Any, value: Any) -> None:
    schema = TypeAdapter(kind).json_schema()

    assert _accepts(schema, value)
    TypeAdapter(kind).validate_json(json.dumps(value))


def test_a_schema_that_would_grow_out_of_bounds_is_left_alone() -> None:
    names = [f"name{i}" for i in range(3000)]
    schema = {"type": "object", "propertyNames": {"enum": names}, "additionalProperties": {"enum": names}}
    assert len(json.dumps(plain_schema(schema))) <= len(json.dumps(schema))


@pytest.mark.parametrize("value", [None, 5, [], "x", {"properties": 5}, {"anyOf": 5}, {"items": 5}, {"format": 5}])
def test_nonsense_is_left_for_llguidance_to_refuse(value: Any) -> None:
    assert plain_schema(value) == value


@pytest.mark.parametrize("path", ["#/$defs/none", "#/$defs/loop", "elsewhere", "#/a/b", "#"])
def test_names_by_a_reference_that_leads_nowhere_are_refused(path: str) -> None:
    schema = {"$defs": {"loop": {"$ref": "#/$defs/loop"}}, "type": "object", "propertyNames": {"$ref": path}}
    with pytest.raises(RequestError, match=r"propertyNames|elsewhere"):
        check_grammar(StructuredOutputsParams(json=schema))
