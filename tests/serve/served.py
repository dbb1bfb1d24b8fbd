"""A served fake model, and ways to talk to its app."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from api.fake_engine import EOS_ID, FakeEngine, config
from tiny import make_tokenizer

from rayllm.api.service import ModelService
from rayllm.serve.app import create_app
from rayllm.text.tokenizer import Tokenizer

ANSWER = "Hello wörld 🎉 and more"
KEY = "a-secret-key"


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_path(str(make_tokenizer(Path(folder))))


class Served:
    """An app with its service and engine. `ready=False`: the service is still starting."""

    def __init__(self, *, ready: bool = True, **options: Any):
        self.engine = FakeEngine(lambda request, choice: [*tokenizer().encode(ANSWER), EOS_ID])
        self.service = ModelService()
        if ready:
            self.make_ready()
        self.app = create_app(self.service, **options)

    def make_ready(self, **changes: Any) -> None:
        self.service.set_ready(config(**changes), tokenizer(), self.engine)

    @contextlib.asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://served", headers=headers) as client:
            yield client

    @contextlib.contextmanager
    def port(self) -> Iterator[int]:
        """Serves on a free port of the loopback, in a thread."""
        server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 100, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
