from __future__ import annotations

import asyncio

import pytest
from api.fake_engine import FakeEngine, config

import rayllm.api.service as service_module
from rayllm.api.errors import NotReadyError
from rayllm.api.service import Health, ModelService
from rayllm.errors import EngineError, RequestError
from rayllm.text.tokenizer import Tokenizer


async def test_a_service_says_how_far_it_is() -> None:
    service = ModelService()
    service.set_stage("load shards", "3 of 8")

    with pytest.raises(NotReadyError, match=r"load shards \(3 of 8\)"):
        service.named("tiny")
    assert await service.health() == Health(False, "load shards", "3 of 8")


async def test_health_is_what_the_engine_says(
    service: ModelService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await service.health() == Health(True, "ready")

    engine.healthy = False
    assert await service.health() == Health(False, "ready", "a worker is being replaced")

    engine.stats_error = EngineError("gone")
    assert not (await service.health()).healthy

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "stats", never)
    monkeypatch.setattr(service_module, "HEALTH_TIMEOUT_S", 0.01)
    assert not (await service.health()).healthy


async def test_ready_is_not_health(service: ModelService, engine: FakeEngine) -> None:
    engine.healthy = False
    assert service.ready() == Health(True, "ready")
    assert not (await service.health()).healthy

    service.set_stage("restarting the engine", "it died")
    assert service.ready() == Health(False, "restarting the engine", "it died")


async def test_a_service_that_drains_takes_nothing_new_and_stays_healthy(service: ModelService) -> None:
    assert service.drain() == 0

    assert not service.ready().healthy
    assert (await service.health()).healthy
    with pytest.raises(NotReadyError, match="shutting down"):
        service.named("tiny")


def test_metrics_outlive_the_engine(service: ModelService, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    metrics = service.metrics

    service.set_stage("restarting the engine")
    service.set_ready(config(), tokenizer, engine)

    assert service.model().metrics is metrics


def test_another_models_name_is_not_found(service: ModelService) -> None:
    assert service.named("tiny") is service.named(None)
    with pytest.raises(RequestError, match=r"'other' does not exist.*'tiny'") as caught:
        service.named("other")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_long_texts_and_slow_templates_are_prepared_off_the_event_loop(
    service: ModelService, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.model().prepares_inline(100, is_chat=True)
    assert not service.model().prepares_inline(100_000, is_chat=False)

    monkeypatch.setattr(service_module, "_SLOW_TEMPLATE_S", 0.0)
    service.set_ready(config(), tokenizer, engine)

    assert not service.model().prepares_inline(100, is_chat=True)
    assert service.model().prepares_inline(100, is_chat=False)
