"""Folders of the Hugging Face hub's cache, whose files are links to blobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from teacher import load

from rayllm.config import EngineConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.resolve import resolve, served_name
from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.hub_cache import cached_name, snapshot_of


@pytest.fixture
def cached(tmp_path: Path, llama_path: Path) -> Path:
    """The tiny Llama as the hub's library caches it, at commit `abc`, which is `main`."""
    folder = tmp_path / "models--owner--some--model"
    for name in ("blobs", "refs", "snapshots/abc"):
        (folder / name).mkdir(parents=True)
    for number, path in enumerate(sorted(llama_path.iterdir())):
        shutil.copy(path, folder / "blobs" / str(number))
        (folder / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    (folder / "refs" / "main").write_text("abc")
    return folder


def _resolved(path: Path, **fields: object) -> tuple[str, str]:
    resolved = resolve(EngineConfig.parse({"model": str(path), "device": "cpu", **fields}), num_gpus=0, num_cores=1)
    return resolved.model_path, resolved.served_model_name


def test_a_snapshot_and_the_model_above_it_are_served_under_the_hubs_name(cached: Path) -> None:
    snapshot = cached / "snapshots" / "abc"
    assert _resolved(snapshot) == _resolved(cached) == (str(snapshot), "owner/some--model")
    assert served_name(str(cached)) == "owner/some--model"
    load(TensorParallel(), snapshot)


def test_weights_are_read_through_links(cached: Path) -> None:
    snapshot = cached / "snapshots" / "abc"
    checkpoint = Checkpoint(snapshot)
    for name, tensor in load_file(snapshot / "model.safetensors").items():
        assert torch.equal(checkpoint.read(name, [range(size) for size in tensor.shape]), tensor)


def test_a_link_to_a_blob_that_is_gone_is_named(cached: Path) -> None:
    link = cached / "snapshots" / "abc" / "model.safetensors"
    link.resolve().unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        Checkpoint(link.parent)


def test_a_revision_is_a_reference_or_a_commit(cached: Path) -> None:
    (cached / "snapshots" / "def").mkdir()
    (cached / "refs" / "v2").write_text("def\n")
    assert snapshot_of(cached).name == "abc"
    assert snapshot_of(cached, "v2").name == snapshot_of(cached, "def").name == "def"
    with pytest.raises(ConfigError, match=r"without a snapshot of revision 'v3'; it has abc, def: give --revision"):
        snapshot_of(cached, "v3")
    (cached / "refs" / "main").unlink()
    with pytest.raises(ConfigError, match="revision 'main'"):
        snapshot_of(cached)


def test_one_snapshot_without_a_reference_is_the_one(cached: Path) -> None:
    (cached / "refs" / "main").unlink()
    assert snapshot_of(cached).name == "abc"


def test_other_folders_are_what_they_are(tmp_path: Path) -> None:
    assert snapshot_of(tmp_path) == tmp_path
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert snapshot_of(tmp_path) == tmp_path
    assert cached_name(tmp_path) is None


def test_a_revision_of_a_plain_folder_is_told_to_have_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with caplog.at_level("WARNING"):
        assert snapshot_of(tmp_path, "abc") == tmp_path
    assert "revision='abc' has no effect" in caplog.text
