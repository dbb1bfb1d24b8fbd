"""A model's name at a hub, before anything is asked of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.config import EngineConfig
from rayllm.weights.hub_model import HubModel, no_progress


def test_the_pull_command_gets_the_same_model_to_the_same_place() -> None:
    model = HubModel("owner/model", is_modelscope=True, revision="v2", download_dir="/data")
    assert model.pull_command == "rayllm pull ms:owner/model --revision v2 --download-dir /data"
    assert HubModel("owner/model").pull_command == "rayllm pull owner/model"
    assert str(model) == "owner/model at revision v2"


def test_a_model_needs_no_tokenizer_of_its_own_where_another_or_none_is_used() -> None:
    def model_of(**fields: object) -> HubModel:
        found = HubModel.of(EngineConfig.parse({"model": "owner/model", "device": "cpu", **fields}))
        assert found is not None
        return found

    assert model_of().needs_tokenizer
    assert not model_of(tokenizer="elsewhere").needs_tokenizer
    assert not model_of(skip_tokenizer_init=True).needs_tokenizer


def test_a_folder_is_no_hubs_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert HubModel.parse("owner/model") is None
    assert HubModel.parse("ms:owner/model") is not None, "the prefix says that the hub's is meant"


def test_no_progress_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    no_progress(1, 2)
    assert capsys.readouterr() == ("", "")
