"""Bulk data between the ranks of different islands: parcels over authenticated TCP.

One thread carries everything, so that nothing here ever waits in a step. Each peer has a queue and
a connection of its own, dialled by whoever has something to send and closed again when there is
nothing: a peer that stalls delays nobody else, and none costs anything between two rounds. Parcels
go in frames of a `Session`, and are handed over when they are whole. After every few frames the
other end answers how many it has handed over on this connection.

What was sent and not answered for when a connection ends is sent again on the next one. So every
parcel arrives at least once, and those of a topic in order.
"""

import asyncio
import contextlib
import json
import secrets
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.cluster.wire import NONCE_BYTES, Rejected, Session, decode
from outlast.runtime.islands.parcel import Parcel, Unfinished, bodies, pack

Address = tuple[str, int]
Arrived = Callable[[dict[str, Any], memoryview], None]
T = TypeVar("T")

STRANGERS_MAX = 64
_READ_BYTES = 256 << 10
# Names and numbers of another island that are no address fail in these two ways besides.
_UNREACHABLE = (OSError, Rejected, UnicodeError, OverflowError)


class Exchange:
    """Carries parcels between ranks of different islands.

    Args:
        host: address of this machine, where others reach it.
        key: what all islands of the job share.
        arrived: gets header and payload of a parcel, on the thread of the exchange; it must be
            quick and take whatever another island may send.
    Attributes:
        address: where others send to.
        sent_bytes, received_bytes: on the wire, payload and framing.
    Raises:
        Misuse: nothing can listen at `host`.
    """

    def __init__(self, host: str, key: bytes, arrived: Arrived, timing: Timing) -> None:
        self.sent_bytes = self.received_bytes = 0
        self.key, self.timing, self._arrived = key, timing, arrived
        self._routes: dict[Address, _Route] = {}
        self._strangers = 0
        self._loop = asyncio.new_event_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="outlast-exchange")
        self._thread.daemon = True
        self._thread.start()
        try:
            self._server = self._ask(asyncio.start_server(self._serve, host, 0, limit=_READ_BYTES))
        except OSError as error:
            self._end()
            raise Misuse(f"cannot listen at {host}: {error}: give an address here") from error
        self.address: Address = (host, self._server.sockets[0].getsockname()[1])

    # ---- any thread

    def send(
        self,
        peer: Address,
        topic: tuple[Any, ...],
        parcels: Sequence[tuple[dict[str, Any], bytes | memoryview]],
    ) -> None:
        """Queue these for `peer`, in place of what is queued under `topic` and has not begun.

        Never blocks. A peer that cannot be reached is dialled again until `keep` drops it, so a
        topic should not name what grows without end. Payloads must not change any more.

        Raises:
            ValueError: a parcel is too large: cut it.
        """
        packed = [pack(header, payload) for header, payload in parcels]
        self._loop.call_soon_threadsafe(self._queue, peer, topic, packed)

    def keep(self, peers: Iterable[Address]) -> None:
        """Drop what is queued for all others, and the connections to them."""
        self._loop.call_soon_threadsafe(self._drop, set(peers))

    def flush(self, limit_s: float) -> bool:
        """Wait until all that was queued has been handed over; False: not within `limit_s`."""
        return self._ask(self._settled(limit_s))

    def close(self) -> None:
        """Drop everything and stop listening; to be called last."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._server.close)
        self._end()

    def _end(self) -> None:
        self.keep(())
        self._ask(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- the thread of the exchange: queues

    def _queue(self, peer: Address, topic: tuple[Any, ...], parcels: list[Parcel]) -> None:
        if peer not in self._routes:
            self._routes[peer] = _Route(self, peer, self._note_idle)
        self._routes[peer].put(topic, parcels)
        self._note_idle()

    def _drop(self, peers: set[Address]) -> None:
        for peer in self._routes.keys() - peers:
            self._routes.pop(peer).drop()
        self._note_idle()

    def _note_idle(self) -> None:
        if any(route.pending for route in self._routes.values()):
            self._idle.clear()
        else:
            self._idle.set()

    async def _settled(self, limit_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        return self._idle.is_set()

    # ---- from a peer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = _Stream(self, reader, writer, initiator=False)
        try:
            if await self._known(stream):
                await self._receive(stream)
        except (OSError, Rejected):
            pass  # what is missing will be sent again
        except asyncio.CancelledError:
            pass  # by `close`; asyncio would print where it was
        finally:
            stream.abort()

    async def _known(self, stream: "_Stream") -> bool:
        """Whether the peer has proved that it belongs to the job."""
        if self._strangers == STRANGERS_MAX:
            return False
        self._strangers += 1
        try:
            await stream.greet(self.timing.handshake_s)
        finally:
            self._strangers -= 1
        return True

    async def _receive(self, stream: "_Stream") -> None:
        """Hand over what is whole. Whoever sends ends an idle connection long before this end."""
        limit_s, parcels, unfinished = 2 * self.timing.busy_silence_s, 0, None
        arrived = stream.early
        while True:
            for body in arrived:
                if unfinished is None:
                    unfinished = Unfinished(body)
                else:
                    unfinished.add(body)
                if unfinished.whole:
                    self._arrived(unfinished.header, memoryview(unfinished.payload))
                    parcels, unfinished = parcels + 1, None
            if arrived:  # also where nothing is whole yet: it tells that they arrive
                async with asyncio.timeout(limit_s):
                    await stream.write(json.dumps({"parcels": parcels}).encode())
            arrived = await stream.read(limit_s)


class _Stream:
    """One connection: bodies in, bodies out, all authentic."""

    def __init__(
        self,
        owner: Exchange,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        initiator: bool,
    ) -> None:
        self._owner, self._reader, self._writer = owner, reader, writer
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._session = Session("islands", owner.key, nonce, initiator=initiator)
        self.early: list[bytes] = []  # bodies that came with the introduction of the peer

    async def greet(self, limit_s: float) -> None:
        """Prove to each other that both hold the key; raises TimeoutError after `limit_s`."""
        async with asyncio.timeout(limit_s):
            await self._put(self._session.hello)
            heard: list[bytes] = []
            while not self._session.introduced:
                heard += await self.read(limit_s)
            await self.write(b"")
            while not self._session.authenticated:
                heard += await self.read(limit_s)
        self.early = heard[1:]

    async def read(self, limit_s: float) -> list[bytes]:
        """The bodies that the next bytes complete; raises OSError, Rejected."""
        async with asyncio.timeout(limit_s):
            data = await self._reader.read(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the peer has closed the connection")
        self._owner.received_bytes += len(data)
        return self._session.unseal(data)

    async def write(self, body: bytes) -> None:
        """Send one body, when the connection has room."""
        await self._put(self._session.seal(body))

    async def _put(self, data: bytes) -> None:
        self._writer.write(data)
        self._owner.sent_bytes += len(data)
        await self._writer.drain()

    def abort(self) -> None:
        """End the connection, and what it has not sent."""
        self._writer.transport.abort()


class _Route:
    """What is on its way to one peer.

    Args:
        answered: called when anything has been handed over.
    """

    def __init__(self, owner: Exchange, peer: Address, answered: Callable[[], None]) -> None:
        self._owner, self._peer, self._note = owner, peer, answered
        self._waiting: dict[tuple[Any, ...], list[Parcel]] = {}  # of topics that have not begun
        self._begun: deque[Parcel] = deque()  # not answered for
        self._flying = 0  # of those, on the present connection
        self._answered = 0  # parcels, on the present connection
        self._more = asyncio.Event()
        self._dropped = False
        self._task = asyncio.get_running_loop().create_task(self._feed())
        # A bug there must be seen, and not only as a peer that gets nothing.
        self._task.add_done_callback(lambda task: task.cancelled() or task.result())

    @property
    def pending(self) -> bool:
        """Whether anything is not answered for."""
        return bool(self._begun or self._waiting)

    def put(self, topic: tuple[Any, ...], parcels: list[Parcel]) -> None:
        """Queue `parcels`, at the place of those that they replace."""
        self._waiting[topic] = parcels
        self._more.set()

    def drop(self) -> None:
        """Send nothing more."""
        self._dropped = True  # a cancellation that meets an error is lost in a group of tasks
        self._task.cancel()

    async def _feed(self) -> None:
        while not self._dropped:
            while not self.pending:
                self._more.clear()
                await self._more.wait()
            try:
                await self._connect()
            except* _UNREACHABLE:
                pass  # not there yet, stalled, gone, or long idle: what is pending tells
            await asyncio.sleep(self._owner.timing.heartbeat_s)

    async def _connect(self) -> None:
        """Bring what is queued to the peer, until it has said nothing for long."""
        timing = self._owner.timing
        async with asyncio.timeout(timing.connect_s):
            reader, writer = await asyncio.open_connection(*self._peer, limit=_READ_BYTES)
        stream = _Stream(self._owner, reader, writer, initiator=True)
        try:
            await stream.greet(timing.handshake_s)
            self._flying = self._answered = 0
            async with asyncio.TaskGroup() as group:
                group.create_task(self._bring(stream))
                group.create_task(self._heed(stream))
        finally:
            stream.abort()

    async def _bring(self, stream: _Stream) -> None:
        while True:
            for body in bodies(await self._next()):
                await stream.write(body)

    async def _heed(self, stream: _Stream) -> None:
        while True:
            for answer in await stream.read(self._owner.timing.busy_silence_s):
                self._acknowledge(decode(answer).get("parcels"))
            self._note()

    async def _next(self) -> Parcel:
        """Wait for what is to be sent next on the present connection."""
        while self._flying == len(self._begun):
            if self._waiting:
                self._begun += self._waiting.pop(next(iter(self._waiting)))
            else:
                self._more.clear()
                await self._more.wait()
        self._flying += 1
        return self._begun[self._flying - 1]

    def _acknowledge(self, parcels: object) -> None:
        """The peer has got so many on this connection; raises Rejected if that cannot be."""
        if type(parcels) is not int or not 0 <= parcels - self._answered <= self._flying:
            raise Rejected("an answer to what was not sent")
        for _ in range(parcels - self._answered):
            self._begun.popleft()
        self._flying -= parcels - self._answered
        self._answered = parcels


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
