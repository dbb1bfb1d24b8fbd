"""One run of the engine in which everything is real but sockets, workers and time: a seed decides all that happens.

Real: journal, connection, frames, loop, admission, supervisor, scheduler, fair queue, prefix cache, block pool. An
ingress writes its requests down, a driver serves them, and workers, drivers, ingresses and readers break at every
boundary. In the end each reader must have the tokens of the pure function: none lost, doubled or changed.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fakes import fake_config, fake_spec
from scheduler.simulated_worker import EOS, VOCAB_SIZE, expected_answer
from simulation.faults import DriverKilled, Faults, FaultyExecutor

from rayllm.config import ModelShape, ResolvedConfig
from rayllm.engine.client.driver_connection import DriverConnection
from rayllm.engine.client.journaled_client import JournaledClient, JournaledStream
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.driver.retained_requests import HOLD_S
from rayllm.engine.owner.local import build_scheduler
from rayllm.errors import EngineError
from rayllm.executor.channel import FrameReader, FrameWriter
from rayllm.kv_layout import num_blocks_for
from rayllm.messages import Abort, Adopted, ClientMessage, Deltas, DriverMessage, TokenDelta
from rayllm.request import Request, Retention, SamplingParams, StructuredOutputsParams, pack_ids, unpack_ids

START_S = 4e9  # Unix time of the fake clock: after any real one, which the journal looks at
MAX_MODEL_LEN = 24
MAX_TURNS = 3000
BOUND = StructuredOutputsParams(json="{}")
_STEMS = ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9], [2, 2, 2])


class Pipe:
    """Bytes on their way. `cut` leaves what a dead sender had still got out."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes | bytearray) -> None:
        self._bytes += data

    def __len__(self) -> int:
        return len(self._bytes)

    def read_into(self, space: memoryview, num_bytes: int) -> int:
        num_bytes = min(num_bytes, len(self._bytes), len(space))
        space[:num_bytes] = self._bytes[:num_bytes]
        del self._bytes[:num_bytes]
        return num_bytes

    def cut(self, num_bytes: int) -> None:
        del self._bytes[num_bytes:]


class Socket:
    """One ingress's connection to one driver: the transport of its `DriverConnection`, and the driver's end, which
    knows it as `client`."""

    def __init__(self, client: int, ingress: int):
        self.client = client
        self.ingress = ingress
        self.up, self.down = Pipe(), Pipe()
        self.closed = False
        self.connection = DriverConnection()
        self.connection._wire.connection_made(self)  # type: ignore[arg-type]
        self._reader = FrameReader("an ingress")
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.up.write(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def messages(self, num_bytes: int) -> list[Any]:
        """What the driver reads."""
        self._reader.received(self.up.read_into(self._reader.space(), num_bytes))
        found = []
        while (frame := self._reader.next_frame()) is not None:
            found.append(self._decoder.decode(frame))
        return found

    def deliver(self, num_bytes: int) -> None:
        """What the ingress reads."""
        wire = self.connection._wire
        read = self.down.read_into(wire.get_buffer(-1), num_bytes)
        if read and not self.closed:
            wire.buffer_updated(read)

    def lose(self) -> None:
        self.connection._wire.connection_lost(None)
        self.closed = True


class SmallBuffers:
    """A driver whose readers are paused after a few tokens that they leave."""

    def __init__(self, connection: DriverConnection, max_held_bytes: int):
        self._connection = connection
        self._max_held_bytes = max_held_bytes

    def submit(self, request: Request, max_held_bytes: int | None = None) -> Any:
        return self._connection.submit(request, self._max_held_bytes)

    async def adopt(self, *arguments: Any) -> Any:
        return await self._connection.adopt(*arguments)

    def forget(self, client_key: str, answer_id: str) -> None:
        self._connection.forget(client_key, answer_id)

    async def stats(self) -> Any:
        return await self._connection.stats()


@dataclass
class Driver:
    """A driver's process; nothing of it outlives it."""

    loop: EngineLoop
    executor: FaultyExecutor
    sockets: list[Socket] = field(default_factory=list)
    lost_sockets: list[Socket] = field(default_factory=list)
    """Those whose end it has not read yet."""
    gone: set[object] = field(default_factory=set)
    """Clients that it knows to be gone."""
    unwanted: set[tuple[object, int]] = field(default_factory=set)
    """Client and stream of each choice that was aborted."""
    writer: FrameWriter = field(default_factory=FrameWriter)


@dataclass
class Reader:
    """Who waits for a request, and what came."""

    request: Request
    ingress: int
    pause_rate: float
    close_after: int | None
    drop_choice: tuple[int, int] | None
    """Choice, and its tokens after which no more of it is wanted."""
    faults_before: int = 0
    num_drivers_before: int = 0
    stream: JournaledStream | None = None
    task: asyncio.Task[None] | None = None
    deltas: dict[int, list[TokenDelta]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    closed: bool = False
    error: EngineError | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(delta.token_ids) // 4 for deltas in self.deltas.values() for delta in deltas)

    def tokens(self, choice: int) -> list[int]:
        return [token for delta in self.deltas[choice] for token in unpack_ids(delta.token_ids)]


class World:
    """`await run()` raises `AssertionError` where a promise is broken."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.now = START_S
        calm = rng.random() < 0.1
        self.faults = Faults(
            rng,
            worker_rate=0.0 if calm else rng.choice([0.0, 0.02, 0.1]),
            driver_rate=0.0 if calm else rng.choice([0.0, 0.005, 0.02]),
            max_worker=rng.randint(1, 6),
            max_driver=rng.randint(1, 2),
        )
        self.block_size = rng.choice([1, 2, 4])
        num_spare_blocks = rng.choice([0, 1, 3, 40])
        self.max_inflight_steps = rng.choice([1, 2])
        self.windows = random.Random(f"windows of {seed}").choice([(None,), (None,), (3,), (None, 5), (7, 2)])
        self.config = self._config()
        self.num_blocks = num_blocks_for(self.config.kv_spans(), MAX_MODEL_LEN) + num_spare_blocks
        self.engines = [JournaledClient() for _ in range(rng.choice([1, 1, 2]))]
        self.lost_ingresses: set[int] = set()
        self.deadline_share = rng.choice([0.0, 0.0, 0.3])
        self.num_client_keys = rng.choice([1, 1, 3])
        self.readers: list[Reader] = []
        self.previous_tasks: list[asyncio.Task[None]] = []
        """Of readers that went on to another ingress."""
        self.driver: Driver | None = None
        self.num_drivers_lost = 0
        self.num_connections = 0
        self.num_connections_lost = 0
        self.connection_rate = 0.0 if calm else rng.choice([0.0, 0.0, 0.01])
        self.num_steps = 0
        self.num_adopted = 0

    def _config(self) -> ResolvedConfig:
        rng = self.rng
        engine = {
            "enable_prefix_caching": rng.random() < 0.7,
            "max_queued_requests": rng.choice([None, None, 2]),
            "max_queued_tokens": rng.choice([None, None, 20]),
        }
        return fake_config(
            engine=engine,
            max_model_len=MAX_MODEL_LEN,
            block_size=self.block_size,
            max_num_seqs=rng.choice([1, 2, 4, 6]),
            max_num_batched_tokens=rng.choice([1, 3, 8, 32]),
            spec=fake_spec(windows=self.windows),
            shape=ModelShape(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), num_layers=1),
        )

    # ----------------------------------------------------------------------------------------------- the run

    async def run(self) -> None:
        waiting = [self._reader(number) for number in range(self.rng.randint(1, 7))]
        try:
            for _ in range(MAX_TURNS):
                if waiting and self.rng.random() < 0.3:
                    self._submit(waiting.pop())
                self.now += self.rng.choice([0.01, 0.01, 0.5])
                self._turn()
                self._end_readers()
                for _ in range(self.rng.choice([1, 3, 6])):
                    await asyncio.sleep(0)
                if not waiting and all(reader.task is None or reader.task.done() for reader in self.readers):
                    break
            else:
                raise AssertionError(f"after {MAX_TURNS} turns some still wait: {self._open_readers()}")
            self._settle()
        finally:
            tasks = [reader.task for reader in self.readers if reader.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for reader in self.readers:
            if reader.task is not None and not reader.task.cancelled() and (failure := reader.task.exception()):
                raise failure
            self._judge(reader)

    def _open_readers(self) -> list[str]:
        return [f"{r.request.request_id} has {r.num_tokens}" for r in self.readers if r.task and not r.task.done()]

    def _turn(self) -> None:
        if self.driver is None:
            if self.rng.random() < 0.3:
                self._start_driver()
            return
        driver = self.driver
        try:
            self._drive(driver)
        except DriverKilled:
            self._lose_driver()
        except EngineError as error:  # it has told its clients, and ends
            if "replacement failed" not in str(error) and "faults in a row" not in str(error):
                raise AssertionError(f"the driver gave up: {error}") from error
            self._lose_driver()
        else:
            for socket in driver.sockets:
                socket.deliver(self.rng.choice([7, 1000, 1000, 10**6]))
            self._maybe_lose_connection(driver)
            self._maybe_lose_ingress(driver)

    def _drive(self, driver: Driver) -> None:
        """One turn of `engine.driver.run_loop`."""
        loop = driver.loop
        lost_first = (
            self.rng.random() < 0.5
        )  # an ingress may be back before its previous connection is known to be lost
        if lost_first:
            self._read_lost(driver)
        for socket in driver.sockets:
            self._read_messages(driver, socket, self.rng.choice([40, 1000, 10**6]))
        if not lost_first:
            self._read_lost(driver)
        self._check_gone(driver)
        if not loop.step():
            loop.check()
        self.num_steps += 1
        loop._scheduler.check()
        loop._open.check()

    def _read_messages(self, driver: Driver, socket: Socket, num_bytes: int) -> None:
        for message in socket.messages(num_bytes):
            self.faults.kill_driver_here("before a message")
            driver.loop.submit(socket.client, message)
            if isinstance(message, Abort):
                driver.unwanted.add((socket.client, message.stream))
            self.faults.kill_driver_here("after a message")

    def _read_lost(self, driver: Driver) -> None:
        """What had come of connections that are lost, and their end."""
        while driver.lost_sockets:
            socket = driver.lost_sockets.pop()
            self._read_messages(driver, socket, 10**6)
            driver.loop.client_gone(socket.client)
            driver.gone.add(socket.client)

    def _check_gone(self, driver: Driver) -> None:
        """What no one wants has no row, no KV and no place in the queue, from the moment it is known."""
        scheduler = driver.loop._scheduler
        for sequence in (*scheduler._running, *scheduler.waiting):
            open_ = driver.loop._open[sequence.request.request_id]
            stream = open_.first_stream + sequence.choice
            assert (open_.client, stream) not in driver.unwanted, f"{sequence} goes on for no one"
            if open_.client in driver.gone:
                kept = open_.retained is not None and driver.loop._retained.holds(open_.retained)
                assert kept, f"{sequence} goes on without its ingress"

    def _settle(self) -> None:
        """No one wants anything any more: the driver comes back to its base line."""
        self.faults.num_driver_left = self.faults.num_worker_left = 0
        if self.driver is None:
            return
        driver = self.driver
        self.now += 2 * HOLD_S  # nobody comes for what is kept
        for _ in range(50):
            try:
                self._drive(driver)
            except EngineError:  # it was on its way out
                return
            if not any(len(socket.up) for socket in driver.sockets) and not driver.loop.step():
                break
        scheduler = driver.loop._scheduler
        scheduler.check()
        counts = scheduler.num_running, scheduler.num_waiting, scheduler.num_uncommitted, scheduler.num_blocks_used
        assert counts == (0, 0, 0, 0), f"running, waiting, uncommitted, blocks used: {counts}"
        assert not driver.loop._open, "a request is open and no one reads it"
        self.now += 2 * HOLD_S
        driver.loop.step()
        assert not driver.loop._retained._by_name, "a request is kept for ever"
        assert scheduler.num_free_slots == self.num_blocks // len(self.windows) * self.block_size

    # ----------------------------------------------------------------------------------------------- drivers

    def _start_driver(self) -> None:
        executor = FaultyExecutor(
            self.faults,
            self.max_inflight_steps,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            windows=self.windows,
        )
        scheduler = build_scheduler(self.config, self.num_blocks)
        clock = self._clock
        loop = EngineLoop(self.config, scheduler, executor, self._send, wall_clock=clock, clock=clock)
        self.driver = driver = Driver(loop, executor)
        for ingress in range(len(self.engines)):
            self._connect(driver, ingress)

    def _connect(self, driver: Driver, ingress: int) -> None:
        if ingress in self.lost_ingresses or any(socket.ingress == ingress for socket in driver.sockets):
            return
        socket = Socket(self.num_connections, ingress)
        self.num_connections += 1
        driver.sockets.append(socket)
        self.engines[ingress].attach(SmallBuffers(socket.connection, self.rng.choice([1500, 10**6])))

    def _clock(self) -> float:
        return self.now

    def _send(self, client: object, message: DriverMessage) -> None:
        """The driver's outbox."""
        assert self.driver is not None
        assert isinstance(message, (Deltas, Adopted))
        self.faults.kill_driver_here("before a frame is sent")
        frame = bytes(self.driver.writer.frame(message))
        socket = next((socket for socket in self.driver.sockets if socket.client == client), None)
        if socket is None:
            return
        cut = self.rng.randrange(len(frame))
        socket.down.write(frame[:cut])
        self.faults.kill_driver_here("in the middle of a frame")
        socket.down.write(frame[cut:])
        self.faults.kill_driver_here("after a frame is sent")

    def _lose_driver(self) -> None:
        driver, self.driver = self.driver, None
        assert driver is not None
        self.num_drivers_lost += 1
        for socket in driver.sockets:
            self._end_connection(socket, "the driver is lost")

    def _end_connection(self, socket: Socket, reason: str) -> None:
        """As the ingress sees it."""
        if self.rng.random() < 0.5:  # what is in a socket's buffer comes, or not
            socket.down.cut(self.rng.randint(0, len(socket.down)))
        socket.deliver(10**6)
        self.engines[socket.ingress].detach(reason)
        socket.lose()

    # --------------------------------------------------------------------------------------------- ingresses

    def _maybe_lose_connection(self, driver: Driver) -> None:
        """Driver and ingress live, and the ingress connects again after a while."""
        if self.rng.random() < 0.3:
            self._connect(driver, self.rng.randrange(len(self.engines)))
        if not driver.sockets or self.rng.random() >= self.connection_rate:
            return
        socket = self.rng.choice(driver.sockets)
        self.num_connections_lost += 1
        self.faults.log.append("connection lost")
        self._end_connection(socket, "the connection is lost")
        self._lose_socket(driver, socket)

    def _lose_socket(self, driver: Driver, socket: Socket) -> None:
        """As the driver will see it."""
        socket.closed = True
        driver.sockets.remove(socket)
        socket.up.cut(self.rng.randint(0, len(socket.up)))
        driver.lost_sockets.append(socket)

    def _maybe_lose_ingress(self, driver: Driver) -> None:
        if self.rng.random() >= 0.006 * (len(self.engines) - 1):
            return
        number = self.rng.randrange(len(self.engines))
        if number in self.lost_ingresses:
            return
        self.lost_ingresses.add(number)
        self.faults.log.append(f"ingress {number} lost")
        others = [other for other in range(len(self.engines)) if other not in self.lost_ingresses]
        for reader in self.readers:
            if (
                reader.ingress == number
                and reader.request.retention
                and others
                and not (reader.task and reader.task.done())
            ):
                self._move(reader, self.rng.choice(others))
        self._end_readers()
        for socket in [socket for socket in driver.sockets if socket.ingress == number]:
            self._lose_socket(driver, socket)

    def _move(self, reader: Reader, ingress: int) -> None:
        """Its ingress is lost: it asks another one for its answer."""
        assert reader.task is not None
        reader.task.cancel()
        self.previous_tasks.append(reader.task)
        reader.ingress = ingress
        reader.task = asyncio.create_task(self._adopt(reader))

    def _end_readers(self) -> None:
        """Those of lost ingresses. Asked for again each turn: before Python 3.12 `asyncio.wait_for` may swallow it."""
        for task in self.previous_tasks:
            task.cancel()
        for reader in self.readers:
            if reader.ingress in self.lost_ingresses and reader.task is not None:
                reader.closed = True
                reader.task.cancel()

    # ------------------------------------------------------------------------------------------------ readers

    def _reader(self, number: int) -> Reader:
        rng = self.rng
        stem = rng.choice(_STEMS)
        prompt = stem[: rng.randint(1, 8)] + [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        max_tokens = rng.randint(1, 12)
        n = rng.choice([1, 1, 1, 2, 3])
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 1, max_tokens]),
            ignore_eos=rng.random() < 0.6,
            stop_token_ids=rng.choice([(), (), (5, 6)]),
            logprobs=rng.choice([None, None, 0]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
            structured_outputs=rng.choice([None, None, BOUND]),
        )
        request = Request(
            request_id=f"r{number}",
            prompt=pack_ids(prompt),
            params=params,
            seed=rng.randrange(100),
            max_tokens=max_tokens,
            priority=rng.choice([0, 0, 0, 1, -1]),
            cache_salt=rng.choice(["", "", "salt"]),
            client_key=str(rng.randrange(self.num_client_keys)),
            retention=Retention(f"answer {number}", b"") if rng.random() < 0.5 else None,
        )
        return Reader(
            request,
            ingress=rng.randrange(len(self.engines)),
            pause_rate=rng.choice([0.0, 0.0, 0.5, 0.9]),
            close_after=rng.choice([None, None, None, 0, 1, 4]),
            drop_choice=(rng.randrange(n), rng.randint(0, 4)) if rng.random() < 0.2 else None,
        )

    def _submit(self, reader: Reader) -> None:
        if reader.ingress in self.lost_ingresses:
            return
        if self.rng.random() < self.deadline_share:
            deadline_s = self.now + self.rng.choice([0.3, 3.0, 30.0])
            reader.request = msgspec.structs.replace(reader.request, deadline_s=deadline_s)
        reader.faults_before = self._num_faults()
        reader.num_drivers_before = self.num_drivers_lost
        reader.deltas = {}
        self.readers.append(reader)
        reader.task = asyncio.create_task(self._read(reader))

    def _num_faults(self) -> int:
        """Those that the engine and the ingresses have met."""
        return self.faults.num_recoveries + self.num_drivers_lost + self.num_connections_lost

    async def _read(self, reader: Reader) -> None:
        await self._read_all(reader, self.engines[reader.ingress].submit(reader.request))

    async def _adopt(self, reader: Reader) -> None:
        had_tokens, keep = reader.num_tokens > 0, reader.request.retention
        assert keep is not None
        try:
            stream = await self.engines[reader.ingress].adopt(reader.request.client_key, keep.answer_id)
        except EngineError:  # the driver is lost too
            reader.closed = True
            return
        if stream is None:
            reader.closed = True
            lost = self.num_drivers_lost > reader.num_drivers_before
            assert lost or not had_tokens, f"{reader.request.request_id} is not kept"
            return
        self.num_adopted += 1
        await self._read_all(reader, stream)

    async def _read_all(self, reader: Reader, stream: JournaledStream) -> None:
        reader.stream = stream
        reader.deltas = mine = {choice: [] for choice in range(reader.request.params.n)}
        try:
            if reader.close_after == 0:
                await asyncio.sleep(0)
                reader.closed = True
                return
            num_batches = 0
            async for deltas in stream:
                for delta in deltas:
                    mine[delta.choice].append(delta)
                num_batches += 1
                if num_batches == reader.close_after:
                    reader.closed = True
                    return
                if reader.drop_choice is not None and reader.drop_choice[0] not in reader.dropped:
                    choice, num_tokens = reader.drop_choice
                    if len(reader.tokens(choice)) >= num_tokens:
                        reader.dropped.add(choice)
                        stream.abort_choice(choice)
                while self.rng.random() < reader.pause_rate:
                    await asyncio.sleep(0)
        except EngineError as error:
            reader.error = error
        finally:
            stream.close()

    # ------------------------------------------------------------------------------------------------- verdict

    def _judge(self, reader: Reader) -> None:
        request = reader.request
        finishes = {choice: deltas[-1].finish for choice, deltas in reader.deltas.items() if deltas}
        for choice, deltas in reader.deltas.items():
            expected, reason, stop_reason = expected_answer(request, choice, MAX_MODEL_LEN)
            tokens = reader.tokens(choice)
            assert tokens == expected[: len(tokens)], f"{request.request_id}/{choice}: {tokens}, not {expected}"
            assert all(delta.finish is None for delta in deltas[:-1]), "a delta after the end"
            self._judge_logprobs(reader, choice, deltas)
            finish = finishes.get(choice)
            if finish is not None and finish.reason == "error":
                self._judge_refusal(reader, str(finish.code), str(finish.message), finish.retry_after_s)
            elif finish is not None and finish.reason == "abort":
                assert choice in reader.dropped, f"{request.request_id}/{choice} was ended by nobody"
            elif finish is not None:
                assert (tokens, finish.reason, finish.stop_reason) == (expected, reason, stop_reason)
                by_grammar = reason == "stop" and stop_reason is None and tokens[-1] != EOS
                assert finish.is_complete == by_grammar, "its last token is text, or is none"
            else:
                given_up = reader.closed or reader.error is not None or choice in reader.dropped
                assert given_up, f"{request.request_id}/{choice} ended with {tokens} of {expected} and no word"
        if reader.error is not None:
            self._judge_refusal(reader, reader.error.code, str(reader.error), 1.0)

    def _judge_logprobs(self, reader: Reader, choice: int, deltas: list[TokenDelta]) -> None:
        params, num_prompt_tokens = reader.request.params, len(reader.request.prompt) // 4
        said = [entry for delta in deltas for entry in delta.logprobs or ()]
        tokens = reader.tokens(choice)
        if params.logprobs is None:
            assert not said
        else:
            assert [unpack_ids(entry.ids)[0] for entry in said] == tokens
            assert [entry.rank for entry in said] == list(range(num_prompt_tokens, num_prompt_tokens + len(tokens)))
        lists = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
        assert len(lists) == (params.prompt_logprobs is not None and choice == 0 and bool(tokens))
        if lists:
            assert [entry.rank for entry in lists[0]] == list(range(1, num_prompt_tokens))

    def _judge_refusal(self, reader: Reader, code: str, message: str, retry_after_s: float | None) -> None:
        """The few words with which a request may end before its time."""
        engine, request = self.config.engine, reader.request
        if code == "overloaded":
            bounded = engine.max_queued_requests or engine.max_queued_tokens or request.deadline_s
            assert bounded, "refused, and the queue has no bound"
            assert not reader.num_tokens, "refused after it was let in"
            assert retry_after_s is not None
        elif code == "deadline_exceeded":
            assert request.deadline_s is not None, "it has no deadline"
            given_up = "waited too long" in message and not reader.num_tokens
            assert given_up or request.deadline_s <= self.now, "its deadline has not come"
        elif code == "invalid_logits":
            assert (request.prompt, request.seed) in self.faults.spoiled, "no NaN was computed for it"
        else:
            assert code == "poison_request", f"{request.request_id} ended with {code}"
            assert self._num_faults() - reader.faults_before >= 3, "called poison before three faults"


def run_seed(seed: int) -> World:
    """One run in an event loop of its own."""
    world = World(seed)
    asyncio.run(world.run())
    return world
