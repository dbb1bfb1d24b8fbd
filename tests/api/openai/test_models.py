"""The entries of `/v1/models`, in OpenAI's shape and in Anthropic's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from api.fake_engine import MAX_MODEL_LEN
from openai.types import Model

from rayllm.api.openai.models import anthropic_card, anthropic_list, model_card, model_list
from rayllm.api.service import ModelService, ServedModel


@pytest.fixture
def model(service: ModelService) -> ServedModel:
    return replace(service.model(), created=1_700_000_000)


def test_a_model_has_openais_fields_and_vllms(model: ServedModel) -> None:
    card = model_card(model, "alias")
    Model.model_validate(card, strict=True)
    assert (card["id"], card["root"], card["parent"]) == ("alias", "tiny", None)
    assert (card["created"], card["max_model_len"]) == (1_700_000_000, MAX_MODEL_LEN)
    [permission] = card["permission"]
    assert (permission["id"], permission["allow_sampling"], permission["created"]) == (
        "modelperm-alias",
        True,
        1_700_000_000,
    )
    assert model_list([card]) == {"object": "list", "data": [card]}


def test_a_model_in_anthropics_shape_has_its_time_in_utc(model: ServedModel) -> None:
    card = anthropic_card(model, "alias")
    assert (card["type"], card["id"], card["display_name"]) == ("model", "alias", "alias")
    assert card["created_at"] == "2023-11-14T22:13:20Z"
    assert (card["max_input_tokens"], card["max_tokens"]) == (MAX_MODEL_LEN, MAX_MODEL_LEN)


def test_anthropics_list_names_its_first_and_last(model: ServedModel) -> None:
    cards = [anthropic_card(model, name) for name in ("a", "b", "c")]
    assert anthropic_list(cards) == {"data": cards, "first_id": "a", "last_id": "c", "has_more": False}
    assert anthropic_list([]) == {"data": [], "first_id": None, "last_id": None, "has_more": False}
