"""The models of `/v1/models`: OpenAI's objects with vLLM's fields, or Anthropic's."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from rayllm.api.service import ServedModel


def model_card(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "rayllm",
        "root": model.name,
        "parent": None,
        "max_model_len": model.config.max_model_len,
        "permission": [_permission(model, name)],
    }


def _permission(model: ServedModel, name: str) -> dict[str, Any]:
    """An object that OpenAI has given up, and that older clients read."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": model.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def model_list(cards: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": cards}


def anthropic_card(model: ServedModel, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, timezone.utc)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": model.config.max_model_len,
        "max_tokens": model.config.max_model_len,
        "lifecycle": "active",
    }


def anthropic_list(cards: list[dict[str, Any]]) -> dict[str, Any]:
    names = [card["id"] for card in cards] or [None]
    return {"data": cards, "first_id": names[0], "last_id": names[-1], "has_more": False}
