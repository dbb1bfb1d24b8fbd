from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rayllm.engine.owner import stage_board
from rayllm.engine.owner.stage_board import publish_stage, published_stage


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Ray whose key-value store is `stored`, and which does not answer where `is_silent`."""
    fake = SimpleNamespace(stored={}, is_silent=False, is_initialized=lambda: True)

    def answer() -> dict[bytes, bytes]:
        if fake.is_silent:
            raise RuntimeError("no answer")
        stored: dict[bytes, bytes] = fake.stored
        return stored

    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(stage_board, "kv_put", lambda key, value: answer().__setitem__(key, value))
    monkeypatch.setattr(stage_board, "kv_delete", lambda key: answer().pop(key, None))
    monkeypatch.setattr(stage_board, "kv_get", lambda key: answer().get(key))
    return fake


def test_a_stage_is_read_by_the_name_of_its_engine_until_it_is_withdrawn(ray: SimpleNamespace) -> None:
    publish_stage("a", "restarting")
    assert (published_stage("a"), published_stage("b")) == ("restarting", "")
    publish_stage("a", "")
    assert (published_stage("a"), ray.stored) == ("", {})


def test_a_ray_that_does_not_answer_has_no_stage(ray: SimpleNamespace) -> None:
    ray.is_silent = True
    publish_stage("a", "restarting")
    assert published_stage("a") == ""


def test_nothing_is_published_without_ray(ray: SimpleNamespace) -> None:
    ray.is_initialized = lambda: False
    publish_stage("a", "restarting")
    assert ray.stored == {}
