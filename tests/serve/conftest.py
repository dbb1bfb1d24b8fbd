"""An application with an API key on a port of the loopback, and OpenAI's client of it. Ray Serve is imported here once:
its own deprecation warnings would be errors inside a test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import openai
import pytest
from serve.served import KEY, Served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Served, int]]:
    served = Served(api_keys=(KEY,))
    with served.port() as port:
        yield served, port


@pytest.fixture
def client(served: tuple[Served, int]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key=KEY, max_retries=0) as client:
        yield client
