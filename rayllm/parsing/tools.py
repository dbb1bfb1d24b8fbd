"""`tools` and `tool_choice` of a request: what the model is shown, and what it may or must call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayllm.errors import RequestError, did_you_mean, shorten

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}", re.ASCII)
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict[str, Any]
    """JSON schema of an object."""
    description: str | None = None
    strict: bool = False

    def shown(self) -> dict[str, Any]:
        """OpenAI's object, as templates want it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True)
class ToolPlan:
    """Tools that the model is shown, those of them that it may call, and whether it must."""

    tools: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    mode: Mode
    parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def forced(self) -> bool:
        return self.mode != "auto"


def read_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> ToolPlan | None:
    """The fields of a request; None where the model is to call nothing. Raises `RequestError`."""
    found = [_read_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ())]
    if len(found) > MAX_TOOLS:
        raise RequestError(f"tools holds {len(found)} tools, at most {MAX_TOOLS} are allowed", param="tools")
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tools: the name {twice!r} is given twice", param="tools")
    if choice == "none" or (choice is None and not found):
        return None
    if not found:
        raise RequestError("tool_choice is allowed only where tools are given", param="tool_choice")
    return _planned(tuple(found), choice, parallel is not False)


def _planned(tools: tuple[Tool, ...], choice: Any, parallel: bool) -> ToolPlan:
    if choice is None or choice == "auto":
        return ToolPlan(tools, tools, "auto", parallel)
    if choice == "required":
        return ToolPlan(tools, tools, "required", parallel)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return ToolPlan(tools, (_named(tools, choice, "tool_choice"),), "named", parallel=False)
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        mode, listed = (inner.get("mode"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
        if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
            raise RequestError(
                "tool_choice: allowed_tools needs a mode (auto or required) and a list of tools", param="tool_choice"
            )
        allowed = tuple(_named(tools, entry, f"tool_choice.tools[{i}]") for i, entry in enumerate(listed))
        return ToolPlan(allowed, allowed, mode, parallel)
    raise RequestError(
        "tool_choice must be none, auto, required, {'type': 'function', 'function': {'name': ...}} or "
        f"{{'type': 'allowed_tools', ...}}, got {shorten(choice)}",
        param="tool_choice",
    )


def _named(tools: Sequence[Tool], choice: Any, where: str) -> Tool:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool.name == name:
            return tool
    near = did_you_mean(name, [tool.name for tool in tools]) if isinstance(name, str) else ""
    raise RequestError(f"{where} names {shorten(name)}, which is none of the tools{near}", param="tool_choice")


def _read_tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, dict):
        raise RequestError(f"{where} must be an object, got {shorten(tool)}", param="tools")
    if tool.get("type") != "function":
        raise RequestError(f"{where}.type must be 'function', got {shorten(tool.get('type'))}", param="tools")
    _check_names(where, tool, ("type", "function"))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object, got {shorten(function)}", param="tools")
    where = f"{where}.function"
    _check_names(where, function, _FUNCTION_FIELDS)
    name, description, strict = function.get("name"), function.get("description"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name must have 1 to 64 letters, digits, '_', '-' or '.', got {shorten(name)}", param="tools"
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description must be text, got {shorten(description)}", param="tools")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.strict must be true or false, got {shorten(strict)}", param="tools")
    return Tool(name, _read_parameters(f"{where}.parameters", function.get("parameters")), description, bool(strict))


def _read_parameters(where: str, schema: Any) -> dict[str, Any]:
    if schema is None or schema == {}:
        return _NO_PARAMETERS
    if not isinstance(schema, dict):
        raise RequestError(f"{where} must be a JSON schema, got {shorten(schema)}", param="tools")
    if schema.get("type", "object") != "object":
        raise RequestError(
            f"{where}.type must be 'object': arguments have names; got {shorten(schema['type'])}", param="tools"
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, dict) or not all(isinstance(entry, (dict, bool)) for entry in properties.values()):
        raise RequestError(f"{where}.properties must give each name a schema, got {shorten(properties)}", param="tools")
    return schema


def _check_names(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            shown = name[:100]
            raise RequestError(f"{where}: unknown field {shown!r}{did_you_mean(shown, known)}", param="tools")
