"""JSON schemas as generators write them (Pydantic, OpenAPI, zod, TypeBox, drafts 4 to 2020-12), in the words that
llguidance knows.

Annotations are left out, keywords that say nothing are too, and older or OpenAPI's own ways to say a thing become
today's. What is left and cannot be followed is for llguidance to refuse. No change makes a schema wider: an answer that
follows the result follows the schema. (`format` names that llguidance does not know are annotations, as JSON Schema
2020-12 has it; so is the format of a property's name.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rayllm.structured.decimals import decimal_pattern
from rayllm.structured.exclusive import exclude_each_other

_Schema = dict[str, Any]

_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
        "contentEncoding", "contentMediaType", "contentSchema", "xml", "externalDocs", "discriminator", "enumNames",
        "enumDescriptions", "markdownDescription", "errorMessage", "$vocabulary",
    }
)  # fmt: skip
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SINGLE = frozenset(
    {
        "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
        "unevaluatedProperties", "unevaluatedItems",
    }
)  # fmt: skip
_HOLDERS = ("$schema", "$id", "$anchor", "$defs", "definitions", "components")
"""What references point into: it stays at the place where it stands."""
_COMBINING = frozenset({"$ref", "anyOf", "oneOf", "allOf", "if", "not", "dependentSchemas"})
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"}
)
"""Those that llguidance follows."""
_KNOWN_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[4-7]/schema#?|draft/20(19-09|20-12)/schema#?)")
_LOOKAROUND = re.compile(r"(?<!\\)\(\?<?[=!]")
_MAX_INTEGER = 10**18
_MAX_NUMBER = 1e15
"""Bounds beyond these are more than llguidance can write as a regex; less is allowed then."""
_MAX_DEPTH = 200
_MAX_REFERENCES = 8
_MAX_COPIED_CHARACTERS = 64 * 1024


def plain_schema(schema: Any) -> Any:
    """The schema, in as many words as llguidance knows. What is no schema (an object, or true or false) stays as it
    is."""
    return _Reader(schema if isinstance(schema, dict) else {}).read(schema, 0)


class _Reader:
    def __init__(self, root: _Schema):
        self._root = root
        self._dynamic = _dynamic_anchor(root)

    def read(self, schema: Any, depth: int) -> Any:
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return schema
        found = {name: value for name, value in schema.items() if name not in _ANNOTATIONS and name[:2] != "x-"}
        self._settle_references(found)
        self._settle_alternatives(found, has_discriminator="discriminator" in schema)
        _settle_text(found)
        _settle_bounds(found)
        self._settle_names(found)
        _drop_what_says_nothing(found)
        for name, value in found.items():
            if name in _MAPS and isinstance(value, dict):
                found[name] = {key: self.read(inner, depth + 1) for key, inner in value.items()}
            elif name in _LISTS or (name == "items" and isinstance(value, list)):
                found[name] = [self.read(inner, depth + 1) for inner in value] if isinstance(value, list) else value
            elif name in _SINGLE:
                found[name] = self.read(value, depth + 1)
            elif name == "components" and isinstance(value, dict):
                found[name] = self._components(value, depth)
        never = found.get("not")
        if never is True or never == {}:  # zod's way to say "nothing"
            return False
        return _with_null(found)

    def _settle_alternatives(self, schema: _Schema, *, has_discriminator: bool) -> None:
        """`oneOf` whose alternatives exclude each other is `anyOf`."""
        if "oneOf" not in schema or "anyOf" in schema:
            return
        if has_discriminator or exclude_each_other(schema["oneOf"], self._target):
            schema["anyOf"] = schema.pop("oneOf")

    def _target(self, schema: _Schema) -> _Schema:
        """What a schema that is only a reference points at; itself where that is no object."""
        for _ in range(_MAX_REFERENCES):
            if schema.keys() - _ANNOTATIONS != {"$ref"} or not isinstance(schema["$ref"], str):
                break
            found = _pointed_at(self._root, schema["$ref"])
            if not isinstance(found, dict):
                break
            schema = found
        return schema

    def _components(self, components: _Schema, depth: int) -> _Schema:
        schemas = components.get("schemas")
        if not isinstance(schemas, dict):
            return components
        return {**components, "schemas": {name: self.read(inner, depth + 2) for name, inner in schemas.items()}}

    def _settle_references(self, schema: _Schema) -> None:
        """Dynamic references to the root alone are plain ones."""
        if not _is_known_draft(schema.get("$schema")):
            schema.pop("$schema", None)
        if schema.get("$recursiveRef") == "#":
            schema.setdefault("$ref", schema.pop("$recursiveRef"))
        schema.pop("$recursiveAnchor", None)
        if self._dynamic and schema.get("$dynamicRef") == f"#{self._dynamic}":
            schema.setdefault("$ref", "#")
            del schema["$dynamicRef"]
        if self._dynamic and schema.get("$dynamicAnchor") == self._dynamic:
            del schema["$dynamicAnchor"]

    def _settle_names(self, schema: _Schema) -> None:
        """`propertyNames`: nothing, a list of names, or a pattern."""
        if "propertyNames" not in schema:
            return
        rule = self._resolved(schema["propertyNames"])
        if rule is None:
            return
        values = schema.get("additionalProperties", True)
        names = rule.get("enum", [rule["const"]] if "const" in rule else None)
        pattern = _name_pattern(rule)
        if not rule:
            del schema["propertyNames"]
        elif schema.get("properties") or schema.get("patternProperties"):
            return
        elif isinstance(names, list) and rule.keys() <= {"enum", "const"} and _is_small(names, values):
            schema["properties"] = {name: values for name in names if isinstance(name, str)}
            schema["additionalProperties"] = False
            del schema["propertyNames"]
        elif pattern is not None:
            schema["patternProperties"] = {pattern: values}
            schema["additionalProperties"] = False
            del schema["propertyNames"]

    def _resolved(self, rule: Any) -> _Schema | None:
        """A rule for names without what says nothing of a text; None where it is no object or its reference leads
        nowhere."""
        for _ in range(_MAX_REFERENCES):
            if rule is True:
                return {}
            if not isinstance(rule, dict):
                return None
            if not isinstance(rule.get("$ref"), str):
                break
            rule = _pointed_at(self._root, rule["$ref"])
        said = {name: value for name, value in rule.items() if name not in _ANNOTATIONS | {"format"}}
        if said.get("type") == "string":
            del said["type"]
        return said


def _pointed_at(root: Any, reference: str) -> Any:
    if not reference.startswith("#/"):
        return None
    found = root
    for part in reference[2:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _name_pattern(rule: _Schema) -> str | None:
    """One pattern for names; None where it takes more than one, or another word."""
    if rule.keys() == {"pattern"} and isinstance(rule["pattern"], str):
        return rule["pattern"]
    low, high = rule.get("minLength", 0), rule.get("maxLength", "")
    if rule and rule.keys() <= {"minLength", "maxLength"} and type(low) is int and type(high or 0) is int:
        return rf"^[\s\S]{{{low},{high}}}$"
    return None


def _is_small(names: list[Any], values: Any) -> bool:
    """Whether a copy of `values` for each name is not much."""
    return len(names) * len(json.dumps(values)) <= _MAX_COPIED_CHARACTERS


def _is_known_draft(draft: Any) -> bool:
    return isinstance(draft, str) and _KNOWN_DRAFTS.fullmatch(draft) is not None


def _dynamic_anchor(root: _Schema) -> str | None:
    anchor = root.get("$dynamicAnchor")
    return anchor if isinstance(anchor, str) else None


def _settle_text(schema: _Schema) -> None:
    form, pattern = schema.get("format"), schema.get("pattern")
    if isinstance(form, str) and form not in _FORMATS:
        del schema["format"]
    elif isinstance(form, str) and isinstance(pattern, str) and _LOOKAROUND.search(pattern):
        del schema["pattern"]  # zod writes both, and the format says the same in words that can be followed
    if isinstance(pattern, str) and (decimal := decimal_pattern(pattern)) is not None:
        schema["pattern"] = decimal
    if schema.get("type") == "any":  # draft 3
        del schema["type"]
    if isinstance(schema.get("required"), bool):  # draft 3: its object's business
        del schema["required"]


def _settle_bounds(schema: _Schema) -> None:
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        if isinstance(schema.get(exclusive), bool):  # draft 4
            is_exclusive = schema.pop(exclusive)
            if is_exclusive and inclusive in schema:
                schema[exclusive] = schema.pop(inclusive)
        is_integer = schema.get("type") == "integer"
        largest: int | float = _MAX_INTEGER if is_integer else _MAX_NUMBER
        for name in (inclusive, exclusive):
            bound = schema.get(name)
            if isinstance(bound, (int, float)) and bound * sign > largest:
                schema[name] = sign * largest


_SAYING_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "nullable": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "minProperties": (0,),
    "not": (False,),
}


def _drop_what_says_nothing(schema: _Schema) -> None:
    for name, values in _SAYING_NOTHING.items():
        if name in schema and any(type(schema[name]) is type(value) and schema[name] == value for value in values):
            del schema[name]
    if schema.get("uniqueItems") is True and type(schema.get("maxItems")) is int and schema["maxItems"] <= 1:
        del schema["uniqueItems"]
    if "contains" not in schema or (schema.get("minContains") == 0 and "maxContains" not in schema):
        for name in ("contains", "minContains", "maxContains"):
            schema.pop(name, None)
    if "if" not in schema or not {"then", "else"} & schema.keys():
        for name in ("if", "then", "else"):
            schema.pop(name, None)
    if not _COMBINING & schema.keys():  # then what is not evaluated is what is additional
        for name, same in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            if name in schema:
                schema.setdefault(same, schema.pop(name))


def _with_null(schema: _Schema) -> _Schema:
    """OpenAPI's `nullable`."""
    if not schema.pop("nullable", False):
        return schema
    kept = {name: schema[name] for name in _HOLDERS if name in schema}
    said = {name: value for name, value in schema.items() if name not in kept}
    return {**kept, "anyOf": [said, {"type": "null"}]} if said else schema
