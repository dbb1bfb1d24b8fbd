"""A client of an OpenAI-compatible server, as far as the terminal needs one: stream an answer, count its tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from rayllm.cli.addresses import DEFAULT_URL, http_settings
from rayllm.cli.answer import Piece, ServerError, Timing
from rayllm.errors import EngineUnreachableError

_CONNECT_TIMEOUT_S = 3.0


class ApiClient:
    """Speaks to the server at `url`. Raises `EngineUnreachableError` when none answers and `ServerError` when it
    refuses."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            **http_settings(self.url),
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stage(self) -> str:
        """What `/health` says in a word or a few: `ready`, how far the start is, or why it cannot be said."""
        try:
            answer = self._http.get("/health")
        except httpx.TimeoutException:
            return "does not answer"
        except (httpx.HTTPError, httpx.InvalidURL):
            return "not reachable"
        try:
            found = answer.json()
            stage = str(found["stage"])
        except (ValueError, KeyError, TypeError):
            return "ready" if answer.is_success else f"unhealthy ({answer.status_code})"
        return stage if answer.is_success or stage != "ready" else f"unhealthy: {found.get('reason') or 'no reason'}"

    def get(self, path: str) -> httpx.Response:
        """The answer to a GET, whatever its status."""
        with self._translated():
            return self._http.get(path)

    def get_checked(self, path: str) -> httpx.Response:
        """The answer to a GET; `ServerError` for one that is an error."""
        answer = self.get(path)
        self._check(answer)
        return answer

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The object that a POST is answered with; `ServerError` for an answer that is an error."""
        with self._translated():
            answer = self._http.post(path, json=dict(body))
            self._check(answer)
            return dict(answer.json())

    def model(self) -> str:
        """The name of the first model that the server serves."""
        with self._translated():
            return str(self.get_checked("/v1/models").json()["data"][0]["id"])

    def max_model_len(self, model: str) -> int | None:
        """The context of that model in tokens; None where the server does not say."""
        with self._translated():
            cards = self.get_checked("/v1/models").json()["data"]
        found = next((card.get("max_model_len") for card in cards if card.get("id") == model), None)
        return found if isinstance(found, int) else None

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], params: Mapping[str, Any], timing: Timing
    ) -> Iterator[Piece]:
        """The answer as it comes. Closing the iterator ends the request at the server."""
        body = {"messages": list(messages), **params}
        for choice in self._events("/v1/chat/completions", body, timing):
            delta = choice.get("delta") or {}
            if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
                yield Piece(reasoning, is_reasoning=True)
            if content := delta.get("content"):
                yield Piece(content)

    def stream_completion(self, prompt: str, params: Mapping[str, Any], timing: Timing) -> Iterator[str]:
        """The prompt's continuation as it comes."""
        for choice in self._events("/v1/completions", {"prompt": prompt, **params}, timing):
            yield choice.get("text") or ""

    def _events(self, path: str, body: Mapping[str, Any], timing: Timing) -> Iterator[dict[str, Any]]:
        options = {"include_usage": True, "continuous_usage_stats": True}
        with (
            self._translated(),
            self._http.stream("POST", path, json={**body, "stream": True, "stream_options": options}) as answer,
        ):
            if answer.is_error:
                answer.read()
                self._check(answer)
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield from _choices(json.loads(data), timing)
        raise ServerError("the server closed the stream before the response was complete")

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_error:
            raise refusal(answer, self.url)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise EngineUnreachableError(
                f"no server answers at {self.url}: start one with 'rayllm serve', or give another address"
            ) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise EngineUnreachableError(
                f"{self.url!r} is not a server's address ({error}): give one like {DEFAULT_URL}"
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(f"the connection to {self.url} broke: {error or type(error).__name__}") from None
        except (ValueError, KeyError, IndexError) as error:
            raise ServerError(f"{self.url} does not respond as an OpenAI-compatible server does: {error!r}") from None


def _choices(event: dict[str, Any], timing: Timing) -> Iterator[dict[str, Any]]:
    if "error" in event:
        raise ServerError(str(event["error"].get("message", event["error"])))
    usage = event.get("usage") or {}
    total = usage.get("completion_tokens")
    added = total - timing.num_tokens if total is not None else len(event["choices"])
    timing.num_prompt_tokens = usage.get("prompt_tokens", timing.num_prompt_tokens)
    if added > 0:
        timing.note(added)
    for choice in event["choices"]:
        timing.finish_reason = choice.get("finish_reason") or timing.finish_reason
        yield choice


def refusal(answer: httpx.Response, url: str) -> ServerError:
    """What the server at `url` refused with, in its own words; with a hint where the key is wrong or missing."""
    hint = " (give --api-key KEY, or set RLLM_API_KEY)" if answer.status_code == 401 else ""
    return ServerError(f"{answer.status_code} from {url}: {_error_text(answer)}{hint}")


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300] or answer.reason_phrase
