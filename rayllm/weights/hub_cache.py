"""A model's folder in the Hugging Face hub's cache, given as a folder: `models--OWNER--NAME`, with snapshots that are
links into `blobs`. Plain Python. The layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import logging
from pathlib import Path

from rayllm.errors import ConfigError

log = logging.getLogger(__name__)

_PREFIX = "models--"
_MAIN = "main"


def snapshot_of(folder: Path, revision: str | None = None) -> Path:
    """The folder itself, or, for a model's folder in the cache, the snapshot of `revision` (a branch, tag or commit;
    main by default). `ConfigError` where there is none."""
    snapshots = folder / "snapshots"
    if (folder / "config.json").exists() or not snapshots.is_dir():
        if revision is not None and folder.parent.name != "snapshots":
            log.warning("revision=%r has no effect: %s is a folder, not a model of a hub", revision, folder)
        return folder
    reference = folder / "refs" / (revision or _MAIN)
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    found = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    if commit is None and len(found) == 1:
        return snapshots / found[0]
    if commit not in found:
        raise ConfigError(
            f"{folder} is a folder of the Hugging Face hub's cache without a snapshot of revision "
            f"{revision or _MAIN!r}; it has {', '.join(found) or 'none'}: give --revision, or download the model again"
        )
    return snapshots / str(commit)


def cached_name(folder: Path) -> str | None:
    """The model's name at the hub, for a folder of the cache or a snapshot in it; None for other folders."""
    model = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not model.name.startswith(_PREFIX):
        return None
    return model.name.removeprefix(_PREFIX).replace("--", "/", 1)
