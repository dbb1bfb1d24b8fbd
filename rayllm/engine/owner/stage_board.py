"""What an engine's owner says of it while it has no driver that could: kept by Ray itself, for whoever asks."""

from __future__ import annotations

import contextlib

from rayllm.executor.ray_private import kv_delete, kv_get, kv_put


def publish_stage(engine: str, stage: str) -> None:
    """Says at which stage the engine of that name is; an empty one takes back what was said."""
    import ray

    if not ray.is_initialized():
        return
    with contextlib.suppress(Exception):  # Ray does not answer: nobody could read it either
        if stage:
            kv_put(_key(engine), stage.encode())
        else:
            kv_delete(_key(engine))


def published_stage(engine: str) -> str:
    """What was said last; empty where nothing was, or where Ray does not answer."""
    try:
        stage = kv_get(_key(engine))
    except Exception:
        return ""
    return stage.decode() if stage else ""


def _key(engine: str) -> bytes:
    return f"stage:{engine}".encode()
