"""Downloads from ModelScope: resumed where they broke, checked, and refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from weights.fake_hub import FakeHub, served_hub

from rayllm.config import EngineConfig
from rayllm.errors import ConfigError, HubUnreachableError
from rayllm.weights import modelscope
from rayllm.weights.hub import config_folder, download, downloaded_folder
from rayllm.weights.hub_model import HubModel


@pytest.fixture
def hub(llama_path: Path) -> Iterator[FakeHub]:
    """The tiny Llama."""
    with served_hub({path.name: path.read_bytes() for path in llama_path.iterdir()}) as served:
        yield served


@pytest.fixture
def model(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubModel:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    found = HubModel.parse("ms:owner/model", download_dir=str(tmp_path))
    assert found is not None
    return found


def test_a_download_goes_on_where_it_broke_and_fetches_nothing_twice(hub: FakeHub, model: HubModel) -> None:
    hub.break_at["model.safetensors"] = 1000
    told: list[tuple[int, int]] = []
    assert downloaded_folder(model) is None
    folder = download(model, lambda done, total: told.append((done, total)))
    assert downloaded_folder(model) == folder
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert [asked for name, asked in hub.asked if name == "model.safetensors"] == [None, "bytes=1000-"]
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in folder.iterdir())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    hub.asked.clear()
    download(model)
    assert hub.asked == []


def test_a_download_keeps_nothing_that_is_damaged(
    hub: FakeHub, model: HubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict(hub.files)
    described = hub.describe("/api/v1/models/owner/model/repo/files", {"Revision": ["master"]})
    monkeypatch.setattr(hub, "describe", lambda path, query: described if path.endswith("/files") else None)
    hub.files["config.json"] = files["config.json"].replace(b"l", b"k")
    with pytest.raises(HubUnreachableError, match=r"config\.json of owner/model is corrupt"):
        download(model)
    assert downloaded_folder(model) is None


def test_a_name_that_modelscope_does_not_have_is_refused(model: HubModel, tmp_path: Path) -> None:
    other = HubModel("owner/other", is_modelscope=True, download_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="ModelScope has no model owner/other"):
        download(other)


def test_each_revision_has_a_folder_of_its_own(tmp_path: Path) -> None:
    model = HubModel("owner/model", is_modelscope=True, revision="fix/one", download_dir=str(tmp_path))
    assert modelscope.local_folder(model) is None
    folder = tmp_path / "modelscope" / "owner--model" / "fix--one"
    folder.mkdir(parents=True)
    assert modelscope.local_folder(model) == folder
    assert modelscope.local_folder(HubModel("owner/model", is_modelscope=True, download_dir=str(tmp_path))) is None


def test_a_config_is_brought_alone_and_the_rest_can_follow(hub: FakeHub, model: HubModel, tmp_path: Path) -> None:
    config = EngineConfig(model="ms:owner/model", download_dir=str(tmp_path))
    folder = config_folder(config)
    assert folder is not None
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert downloaded_folder(model) is None
    assert download(model) == folder == config_folder(config)
