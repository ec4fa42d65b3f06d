"""The agent's end of the socket to one worker: JSON objects and descriptors, one per datagram.

Invariant: nothing here ever blocks. What the socket does not take is queued up to a bound; a
worker that does not drain it is silent and will be found so by its missing pongs, therefore what
exceeds the bound is dropped.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

DATAGRAM_BYTES = 128 << 10
QUEUE_LENGTH = 1024
BUFFER_BYTES = 1 << 20
TOO_LONG = f"a message of more than {DATAGRAM_BYTES} bytes"  # which nobody answers

Message = dict[str, Any]


class Link:
    """A non-blocking SOCK_SEQPACKET pair; `peer` is the worker's end, closed after the spawn."""

    def __init__(self, received: Callable[[Message], None]) -> None:
        self._socket, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, self.peer):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._socket.setblocking(False)
        self._received = received
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self.drain)

    def send(self, message: Message, files: list[int] | None = None) -> None:
        """Send now or queue; descriptors are duplicated, so the caller may close its own."""
        if self._socket.fileno() < 0 or len(self._queue) >= QUEUE_LENGTH:
            return
        held = [os.dup(file) for file in files or []]
        self._queue.append((json.dumps(message).encode(), held))
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            data, files = self._queue[0]
            try:
                socket.send_fds(self._socket, [data], files)
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._flush)
                return
            except OSError:  # the worker is gone; latch or pidfd say so
                pass
            self._queue.popleft()
            for file in files:
                os.close(file)
        self._loop.remove_writer(self._socket)

    def drain(self) -> None:
        """Hand over every datagram that has arrived; also called before a death is judged."""
        while self._socket.fileno() >= 0:
            try:
                data, files, flags, _ = socket.recv_fds(self._socket, DATAGRAM_BYTES, 8)
            except BlockingIOError:
                return
            except OSError:
                data, files, flags = b"", [], 0
            for file in files:  # workers send none
                os.close(file)
            if not data:
                self._loop.remove_reader(self._socket)
                return
            message = {"kind": TOO_LONG} if flags & socket.MSG_TRUNC else None
            with contextlib.suppress(ValueError):  # a script may write anything
                message = json.loads(data)
            if isinstance(message, dict):
                self._received(message)

    def close(self) -> None:
        """Close both ends and what is still queued."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        for _, files in self._queue:
            for file in files:
                os.close(file)
        self._queue.clear()
        self._socket.close()
        self.peer.close()
