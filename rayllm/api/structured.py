"""From the fields that bind an answer's text (`response_format`, `structured_outputs`, `guided_*`) to
`StructuredOutputsParams`, and the trial of each before it may run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from rayllm.errors import RequestError, did_you_mean, shorten
from rayllm.request import STRUCTURED_KINDS, Request, StructuredOutputsParams

if TYPE_CHECKING:
    from rayllm.api.protocol import GenerationBody
    from rayllm.api.service import ServedModel

_GUIDED = ("json", "regex", "choice", "grammar")
_FIELDS = ("response_format", "structured_outputs", *(f"guided_{kind}" for kind in _GUIDED))
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_FORMAT_MEMBERS = {
    "json_object": {"type"},
    "json_schema": {"type", "json_schema"},
    "structural_tag": {"type", "structures", "triggers"},
}


def structured_field(body: GenerationBody) -> str | None:
    """The field that binds the answer's text, if any does."""
    given = [name for name in _FIELDS if _binds(name, getattr(body, name))]
    if len(given) > 1:
        raise RequestError(f"{given[1]}: {given[0]} is given too, and an answer can follow only one", param=given[1])
    return given[0] if given else None


def _binds(name: str, value: Any) -> bool:
    return value is not None and not (name == "response_format" and value == {"type": "text"})


def structured_outputs(body: GenerationBody) -> StructuredOutputsParams | None:
    """What the body asks of its answer's text. Raises `RequestError` that names the field."""
    name = structured_field(body)
    if name is None:
        return None
    value = getattr(body, name)
    try:
        if name == "response_format":
            return _response_format(value)
        if name == "structured_outputs":
            return _structured(value)
        return StructuredOutputsParams(**{name.removeprefix("guided_"): value})
    except ValueError as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise RequestError(f"{name}: {reason}", param=name) from None


async def tried(request: Request, model: ServedModel, param: str | None) -> Request:
    """The request, once its grammar was found to be one that can be followed. `param`: the field that brought it."""
    params = request.params
    if params.structured_outputs is None or model.grammars is None:
        return request
    try:
        checked = await model.grammars.check(params.structured_outputs)
    except RequestError as error:
        name = param or "structured_outputs"
        raise RequestError(f"{name}: {error.message}", param=name, code=error.code) from None
    if checked is params.structured_outputs:
        return request
    return msgspec.structs.replace(request, params=params.with_(structured_outputs=checked))


def _response_format(given: dict[str, Any]) -> StructuredOutputsParams:
    kind = given.get("type")
    if kind not in _FORMATS:
        near = did_you_mean(kind, _FORMATS) if isinstance(kind, str) else ""
        raise ValueError(f"type must be one of {', '.join(_FORMATS)}, got {shorten(kind)}{near}")
    members = {name for name, value in given.items() if value is not None}
    if unknown := members - _FORMAT_MEMBERS.get(kind, {"type"}):
        raise ValueError(f"unknown member {shorten(min(unknown))} for type {kind!r}")
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag={name: given[name] for name in members - {"type"}})  # type: ignore[arg-type]
    return _json_schema(given.get("json_schema"))


def _json_schema(given: Any) -> StructuredOutputsParams:
    """OpenAI's shape: a named schema. Strict or not, the answer follows it."""
    if not isinstance(given, dict):
        raise ValueError(f"json_schema must be an object with name and schema, got {shorten(given)}")
    if unknown := given.keys() - {"name", "description", "schema", "strict"}:
        near = did_you_mean(min(unknown), ("name", "description", "schema", "strict"))
        raise ValueError(f"json_schema: unknown member {shorten(min(unknown))}{near}")
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"json_schema.name must be 1 to 64 letters, digits, underscores and dashes, got {shorten(name)}"
        )
    if not isinstance(given.get("description"), (str, type(None))):
        raise ValueError(f"json_schema.description must be text, got {shorten(given['description'])}")
    if not isinstance(given.get("strict"), (bool, type(None))):
        raise ValueError(f"json_schema.strict must be true or false, got {shorten(given['strict'])}")
    schema = given.get("schema")
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"json_schema.schema must be an object, got {shorten(schema)}")
    return StructuredOutputsParams(json=schema)  # type: ignore[arg-type]


def _structured(given: dict[str, Any]) -> StructuredOutputsParams:
    """vLLM's shape."""
    known = (*STRUCTURED_KINDS, "disable_any_whitespace", "disable_fallback")
    fields = {name: value for name, value in given.items() if value is not None}
    if unknown := fields.keys() - set(known):
        raise ValueError(f"unknown member {shorten(min(unknown))}{did_you_mean(min(unknown), known)}")
    fields.pop("disable_fallback", None)  # there is no other backend to fall back on
    return StructuredOutputsParams(**fields)
