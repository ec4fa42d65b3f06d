"""How neighbours on a ring of nodes are measured in pairs: their clocks, and an all-reduce.

Nodes find each other by files in a directory that they share. Of a pair the left node dials; the
two then build a gloo group whose rendezvous keys travel over that connection, as those of a job do
over its control plane. Invariant: round r of the ring ends `PAIR_S` x (r + 1) seconds after the
node began with it at the latest, whatever the others do.
"""

import base64
import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.launch.interface import Interface

MEETING_S = 60.0  # nodes of one step start within seconds, but import torch from one disk
CONNECT_S, PAIR_S = 3.0, 8.0
PINGS, REPEAT_S, NUMEL = 20, 1.0, 1 << 21  # 8 MiB of float32
LINE_BYTES = 1 << 16


class Meeting:
    """The files of all nodes in `directory`; each writes only its own."""

    def __init__(self, directory: Path, node: str) -> None:
        self._directory, self._own = directory, directory / f"{node}.json"

    def write(self, record: dict[str, Any]) -> None:
        """Replace what this node says; for its user's eyes, since a token is in it."""
        fresh = self._own.with_suffix(f".{secrets.token_hex(4)}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(record, file)
        fresh.replace(self._own)

    def records(self) -> dict[str, dict[str, Any]]:
        """What every node has said so far."""
        return {p.stem: json.loads(p.read_text()) for p in self._directory.glob("*.json")}

    def wait(self, enough: Callable[[dict[str, dict[str, Any]]], bool], limit_s: float) -> None:
        """Until the records are enough, or so long."""
        deadline = time.monotonic() + limit_s
        while not enough(self.records()) and time.monotonic() < deadline:
            time.sleep(0.1)


def rounds(nodes: Sequence[str]) -> list[tuple[int, str, str]]:
    """(round, left, right) of every pair of the ring, in order; a node is once in a round."""
    count = len(nodes) if len(nodes) > 2 else len(nodes) - 1
    pairs = [
        (2 if index == count - 1 and count % 2 and count > 1 else index % 2,
         nodes[index], nodes[(index + 1) % len(nodes)])
        for index in range(count)
    ]  # fmt: skip
    return sorted(pairs, key=lambda pair: pair[0])


class Talk:
    """JSON lines over a connection, with a deadline for all of it."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.makefile("rb")

    def say(self, **message: Any) -> None:
        """Send one line."""
        self._connection.settimeout(left_s(self._deadline))
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """The next line; OSError or ValueError if it is none."""
        self._connection.settimeout(left_s(self._deadline))
        message = json.loads(self._file.readline(LINE_BYTES))
        if not isinstance(message, dict):
            raise ConnectionError("not an object")
        return message


def left_s(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`, at least a few milliseconds."""
    return max(0.005, deadline - time.monotonic())


def clock_offset(talk: Talk, clock: Callable[[], float] = time.time) -> float:
    """Seconds by which the clock at the other end is ahead: of the quickest ping."""
    quickest, offset = float("inf"), 0.0
    for _ in range(PINGS):
        sent = clock()
        talk.say(ping=True)
        there, now = float(talk.hear()["time"]), clock()
        if now - sent < quickest:
            quickest, offset = now - sent, there - (sent + now) / 2
    return offset


def answer_pings(talk: Talk, clock: Callable[[], float] = time.time) -> None:
    """The other end of `clock_offset`."""
    for _ in range(PINGS):
        talk.hear()
        talk.say(time=clock())


def all_reduce_s(talk: Talk, rank: int, address: str, limit_s: float) -> tuple[float, object]:
    """Seconds of the quickest of some all-reduces over gloo between the two ends of `talk`, and the
    group: whoever drops it too early breaks the other end's.

    Raises:
        RuntimeError: it failed, or the sum is wrong.
    """
    import torch
    from torch.distributed import ProcessGroupGloo

    from outlast.runtime.rendezvous import RendezvousStore

    store = RendezvousStore(
        lambda key, value: talk.say(key=key, value=base64.b64encode(value).decode()), limit_s
    )

    def listen() -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            while True:
                message = talk.hear()
                store.put(message["key"], base64.b64decode(message["value"]))

    threading.Thread(target=listen, daemon=True).start()
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
    options._timeout = timedelta(seconds=limit_s)
    group = ProcessGroupGloo(store, rank, 2, options)
    quickest, first, votes = float("inf"), time.monotonic(), 2.0
    while votes == 2:  # both ends have time for another one
        numbers = torch.full((NUMEL,), float(rank + 1))
        began = time.monotonic()
        numbers[0] = float(began - first < REPEAT_S)
        group.allreduce([numbers]).wait(timedelta(seconds=limit_s))
        quickest = min(quickest, time.monotonic() - began)
        votes = float(numbers[0])
        if not bool((numbers[1:] == 3).all()):
            raise RuntimeError("the sum is wrong: bytes change on the way")
    return quickest, group


class Ring:
    """This node's end of its pairs; `token` tells a neighbour from a stranger."""

    def __init__(self, node: str, way: Interface) -> None:
        self.node, self.token = node, secrets.token_hex(16)
        family = socket.AF_INET6 if ":" in way.address else socket.AF_INET
        self._server = socket.create_server((way.address, 0), family=family)
        self._address, self._groups = way.address, list[object]()
        self.port: int = self._server.getsockname()[1]

    def measure(
        self, nodes: Sequence[str], met: dict[str, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What became of each pair of this node with those that have met."""
        began = time.monotonic()
        for number, left, right in rounds(nodes):
            if self.node not in (left, right) or not {left, right} <= set(met):
                continue
            deadline = began + PAIR_S * (number + 1)
            pair = {"left": left, "right": right, "seconds": None, "offset": None, "text": ""}
            try:
                pair |= self._pair(met[right], self.node == left, deadline)
            except (OSError, RuntimeError, ValueError, KeyError, Misuse) as error:
                pair["text"] = " ".join(str(error).split())[:200] or type(error).__name__
            yield pair

    def _pair(self, right: dict[str, Any], dials: bool, deadline: float) -> dict[str, Any]:
        with self._dialled(right, deadline) if dials else self._accepted(deadline) as connection:
            talk = Talk(connection, deadline)
            if dials:
                talk.say(token=right["token"])
                offset = clock_offset(talk)
            elif not hmac.compare_digest(str(talk.hear()["token"]), self.token):
                raise RuntimeError("a stranger dialled")
            else:
                answer_pings(talk)
            limit_s = left_s(deadline)
            seconds, group = all_reduce_s(talk, int(not dials), self._address, limit_s)
            self._groups.append(group)
            return {"seconds": seconds} | ({"offset": offset} if dials else {})

    def _dialled(self, right: dict[str, Any], deadline: float) -> socket.socket:
        address = (str(right["host"]), int(right["port"]))
        # Whoever is busy with another pair still takes the connection.
        return socket.create_connection(address, CONNECT_S, (self._address, 0))

    def _accepted(self, deadline: float) -> socket.socket:
        self._server.settimeout(left_s(deadline))
        return self._server.accept()[0]
