"""Engines that other processes run: `get_engine` by name, `connect` by whatever names a server of this machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from rayllm.async_engine import AsyncEngine
from rayllm.config import RAY_NAMESPACE, Environment, ResolvedConfig
from rayllm.engine.client.driver_connection import DriverConnection
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.client.named_connection import connect_by_name
from rayllm.engine.client.pending import LoopThread, Pending, PendingOutputs, in_thread, loop_is_running
from rayllm.engine.discovery import find_driver, known_engines
from rayllm.engine.owner.generation_config import default_sampling_params
from rayllm.engine.owner.watched import KeepAttached, while_ray_lives
from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.executor.ray_access import check_access, read_token
from rayllm.executor.ray_cluster import check_reachable, running_cluster
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.executor.ray_join import SharedRay, cluster_address
from rayllm.machine.registry import Entry, find, find_named, running
from rayllm.messages import EngineStats
from rayllm.prompt.prompts import Conversation, Prompt
from rayllm.request import CompletionOutput, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer

_DESCRIBE_TIMEOUT_S = 10.0
T = TypeVar("T")
_shared_ray = SharedRay()
"""Of this process, as the connection to Ray itself is."""


@dataclass
class _Found:
    """A running engine, as this process reaches it."""

    name: str
    namespace: str
    config: ResolvedConfig
    release: Callable[[], None]
    """Gives up the connection to Ray that finding it took."""


class RemoteEngine:
    """An engine that another process runs. Where its driver is lost, its owner makes another one, and requests go on
    there.

    For programs with and without asyncio, and for any number of threads: what a method returns is awaited, or its
    `result()` is taken; answers are also iterated, with `async for` or `for`. In a coroutine, an error of finding the
    engine is raised by `await engine` (or by the first use). Its tokenizer's folder must be readable here.
    """

    def __init__(self, locate: Callable[[], _Found]):
        self._thread = LoopThread("rayllm-engine")
        self._found: Future[_Found] = in_thread(locate, "rayllm-connect")
        self._engine: AsyncEngine | None = None
        self._closing: Pending[None] | None = None
        if not loop_is_running():
            self._result_of_finding()

    def _result_of_finding(self) -> _Found:
        try:
            return self._found.result()
        except BaseException:
            self._thread.stop()
            raise

    # ------------------------------------------------------------------------------------------------- requests

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> PendingOutputs[RequestOutput]:
        """Sends one prompt. `await` gives its whole output; iterating gives outputs that grow, the last is `finished`.
        Raises there, as `AsyncLLM.generate` does."""
        return self._outputs(lambda engine: engine.generate(prompt, sampling_params, request_id), grows=True)

    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> PendingOutputs[RequestOutput]:
        """Sends one conversation; see `generate`. `options` are those of `AsyncLLM.chat`."""
        return self._outputs(lambda engine: engine.chat(messages, sampling_params, request_id, **options), grows=True)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> PendingOutputs[CompletionOutput]:
        """Sends one prompt; each item holds what was added to its choice (`index`)."""
        return self._outputs(lambda engine: engine.stream(prompt, sampling_params, request_id), grows=False)

    def _outputs(self, ask: Callable[[AsyncEngine], AsyncIterator[T]], *, grows: bool) -> PendingOutputs[T]:
        self._check_open()

        async def outputs() -> AsyncIterator[T]:
            answers = ask(await self._opened())
            try:
                async for output in answers:
                    yield output
            finally:
                await answers.aclose()  # type: ignore[attr-defined]  # an asynchronous generator

        return PendingOutputs(self._thread, outputs(), grows=grows)

    # ----------------------------------------------------------------------------------------------- the engine

    @property
    def config(self) -> ResolvedConfig:
        """What the engine runs with. Waits until it is found: in a coroutine, `await` the engine before."""
        return self._found_now().config

    @property
    def name(self) -> str:
        return self._found_now().name

    @property
    def driver(self) -> Any:
        """The handle of the driver's actor, as it is now."""
        found = self._found_now()
        return find_driver(found.name, found.namespace)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_config(self.config)

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return default_sampling_params(self.config.generation)

    def stats(self) -> Pending[EngineStats]:
        """The engine's counters and gauges."""
        self._check_open()

        async def ask() -> EngineStats:
            return await (await self._opened()).stats()

        return Pending(self._thread.submit(ask()))

    def reset_prefix_cache(self) -> Pending[bool]:
        """As `AsyncLLM.reset_prefix_cache`."""
        self._check_open()

        async def ask() -> bool:
            return await (await self._opened()).reset_prefix_cache()

        return Pending(self._thread.submit(ask()))

    def close(self) -> Pending[None]:
        """Ends this client and its open requests, and the connection to Ray where it was made for this engine. The
        engine itself runs on. Where no event loop runs it is done when this returns, else when it was awaited; safe to
        call twice."""
        if self._closing is None:
            self._closing = Pending(in_thread(self._close, "rayllm-close"))
        if not loop_is_running():
            self._closing.result()
        return self._closing

    def _close(self) -> None:
        engine = self._engine
        try:
            if engine is not None:
                self._thread.submit(engine.close()).result()
        finally:
            self._thread.stop()
            self._thread.join()
            if self._found.exception() is None:
                self._found.result().release()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise EngineUnreachableError("this handle of an engine was closed: call get_engine again")

    def _found_now(self) -> _Found:
        if loop_is_running() and not self._found.done():
            raise RuntimeError("the engine is still being looked for: 'await' it first")
        return self._found.result()

    async def _opened(self) -> AsyncEngine:
        """On this engine's own loop: the client of the engine, once that is found."""
        found = await asyncio.wrap_future(self._found)
        if self._engine is None:
            self._engine = AsyncEngine(found.config, while_ray_lives(_keep_attached(found.name, found.namespace)))
        return self._engine

    def __await__(self) -> Generator[Any, None, RemoteEngine]:
        return self._awaited().__await__()

    async def _awaited(self) -> RemoteEngine:
        try:
            await asyncio.shield(asyncio.wrap_future(self._found))
        except Exception:
            self._thread.stop()
            raise
        return self

    async def __aenter__(self) -> RemoteEngine:
        return await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Passed to a task or an actor, it is the same engine, found again there."""
        found = self._found_now()
        return get_engine, (found.name, found.namespace)


def _keep_attached(name: str, namespace: str) -> KeepAttached:
    async def connect_again() -> DriverConnection:
        return await connect_by_name(name, namespace=namespace)

    async def on_unreachable(error: Exception) -> None:
        """Whatever it is: the next driver may do better."""

    async def keep(engine: JournaledClient) -> None:
        await engine.keep_attached(connect_again, on_unreachable)

    return keep


# --------------------------------------------------------------------------------------------------- finding one


def get_engine(name: str | None = None, namespace: str = RAY_NAMESPACE) -> RemoteEngine:
    """The running engine of that name; without a name, the only one.

    It is looked for in the Ray that this process is connected to; where it is connected to none, in the cluster at
    RAY_ADDRESS, and else among the servers of this machine (`rayllm ps`), whose Ray this process is then connected to
    as long as the engine is not closed. Raises `EngineUnreachableError` where there is none of that name, and
    `ConfigError` where there are several; both name those that run.
    """
    return RemoteEngine(lambda: _by_name(name, namespace))


def connect(url_or_name: str | None = None) -> RemoteEngine:
    """The engine of a server of this machine, by the server's URL, port, pid, name or model; without a word, of the
    only one. Errors are as in `get_engine`."""
    return RemoteEngine(lambda: _of_server(find(None if url_or_name is None else str(url_or_name))))


def _by_name(name: str | None, namespace: str) -> _Found:
    if ray_is_initialized() and not _shared_ray.is_held:
        return _in_this_ray(name, namespace)
    address = Environment.ray_address()
    if address is not None:
        address = running_cluster() if address == "auto" else address
        check_reachable(address)
        return _joined(address, read_token()[0] if check_access(address, has_mode=False) else "", name, namespace)
    return _of_server(find_named(name), namespace)


def _in_this_ray(name: str | None, namespace: str, release: Callable[[], None] = lambda: None) -> _Found:
    name = name or _only_engine(namespace)
    try:
        return _described(name, namespace, release)
    except EngineUnreachableError as error:
        elsewhere = [entry for entry in _servers() if entry.name == name and entry.ray_address != cluster_address()]
        if not elsewhere:
            raise
        raise _other_ray(elsewhere[0], str(error)) from None


def _of_server(entry: Entry, namespace: str = RAY_NAMESPACE) -> _Found:
    if not entry.ray_address:
        raise EngineUnreachableError(f"server {entry.name!r} (pid {entry.pid}) is starting: its Ray does not run yet")
    if ray_is_initialized() and not _shared_ray.is_held:
        if cluster_address() != entry.ray_address:
            raise _other_ray(entry, f"this process is connected to the Ray at {cluster_address()}")
        return _described(entry.name, namespace, lambda: None)
    return _joined(entry.ray_address, entry.ray_token, entry.name, namespace)


def _joined(address: str, token: str, name: str | None, namespace: str) -> _Found:
    """The engine in the Ray at `address`, to which this process is connected until the engine is released."""
    leave = _shared_ray.join(address, token)
    with contextlib.ExitStack() as undo:
        undo.callback(leave)
        found = _in_this_ray(name, namespace, leave)
        undo.pop_all()
    return found


def _described(name: str, namespace: str, release: Callable[[], None]) -> _Found:
    import ray

    driver = find_driver(name, namespace)
    try:
        description = ray.get(driver.describe.remote(), timeout=_DESCRIBE_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        raise EngineUnreachableError(f"engine {name!r} cannot be used: {error.cause}") from None
    except ray.exceptions.RayError as error:
        raise EngineUnreachableError(f"engine {name!r} cannot be used: {' '.join(str(error).split())[:300]}") from None
    return _Found(name, namespace, ResolvedConfig.model_validate_json(description.config), release)


def _only_engine(namespace: str) -> str:
    """The one that is meant where no name is given. A program's own `LLM` counts where there is nothing else."""
    names = known_engines(namespace)
    names = [name for name in names if not name.startswith("llm-")] or names
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(f"{len(names)} engines run in this Ray, say which by its name: {', '.join(map(repr, names))}")
    servers = _servers()
    if servers:
        raise _other_ray(servers[0], f"no engine runs in the Ray at {cluster_address()}")
    raise EngineUnreachableError(
        f"no engine runs in the Ray at {cluster_address()}, to which this process is connected: start one with "
        "'rayllm serve' or 'serve run'"
    )


def _servers() -> list[Entry]:
    try:
        return running()
    except ConfigError:  # no folder to list them in
        return []


def _other_ray(entry: Entry, why: str) -> EngineUnreachableError:
    return EngineUnreachableError(
        f"{why}; server {entry.name!r} (pid {entry.pid}) runs in the Ray at {entry.ray_address or '(starting)'}, and a "
        "process can be connected to one Ray: call get_engine in a process that is not connected, or after "
        "ray.shutdown(), or use the server over HTTP at " + entry.url
    )
