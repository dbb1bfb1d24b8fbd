"""What an engine's owner says of it while it has no driver that could: kept by Ray itself, for whoever asks."""

from __future__ import annotations

import contextlib

_NAMESPACE = b"rayllm"


def publish_stage(engine: str, stage: str) -> None:
    """Says at which stage the engine of that name is; an empty one takes back what was said."""
    import ray
    from ray.experimental import internal_kv

    if not ray.is_initialized():
        return
    with contextlib.suppress(Exception):  # Ray does not answer: nobody could read it either
        if stage:
            internal_kv._internal_kv_put(_key(engine), stage.encode(), overwrite=True, namespace=_NAMESPACE)
        else:
            internal_kv._internal_kv_del(_key(engine), namespace=_NAMESPACE)


def published_stage(engine: str) -> str:
    """What was said last; empty where nothing was, or where Ray does not answer."""
    from ray.experimental import internal_kv

    try:
        stage = internal_kv._internal_kv_get(_key(engine), namespace=_NAMESPACE)
    except Exception:
        return ""
    return stage.decode() if stage else ""


def _key(engine: str) -> bytes:
    return f"stage:{engine}".encode()
