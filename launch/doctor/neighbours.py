"""How neighbours on a ring of nodes are measured in pairs: their clocks, and an all-reduce.

Of a pair the left node dials; the two then build a gloo group whose rendezvous keys travel over
that connection, as those of a job do over its control plane. Invariant: round r of the ring ends
`PAIR_S` x (r + 1) seconds after the node began with it at the latest, whatever the others do.
"""

import base64
import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from outlast.launch.doctor.examination import FAILURES, failure_text

CONNECT_S, PAIR_S = 3.0, 8.0
PINGS, REPEAT_S, NUMEL = 20, 1.0, 1 << 21  # 8 MiB of float32
LINE_BYTES = 1 << 16


def rounds(nodes: Sequence[str]) -> list[tuple[int, str, str]]:
    """(round, left, right) of every pair of the ring, in order; a node is once in a round."""
    count = len(nodes) if len(nodes) > 2 else len(nodes) - 1
    odd = {count - 1: 2} if count % 2 and count > 1 else {}
    return sorted(
        (odd.get(index, index % 2), nodes[index], nodes[(index + 1) % len(nodes)])
        for index in range(count)
    )


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

    def hear(self, name: str) -> Any:
        """What the next line says of `name`; OSError, ValueError or KeyError if nothing."""
        self._connection.settimeout(left_s(self._deadline))
        return dict(json.loads(self._file.readline(LINE_BYTES)))[name]


def left_s(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`, at least a few milliseconds."""
    return max(0.005, deadline - time.monotonic())


def clock_offset(talk: Talk, clock: Callable[[], float] = time.time) -> float:
    """Seconds by which the clock at the other end is ahead: of the quickest ping."""
    pings = []
    for _ in range(PINGS):
        sent = clock()
        talk.say(ping=True)
        there, now = float(talk.hear("time")), clock()
        pings.append((now - sent, there - (sent + now) / 2))
    return min(pings)[1]


def answer_pings(talk: Talk, clock: Callable[[], float] = time.time) -> None:
    """The other end of `clock_offset`."""
    for _ in range(PINGS):
        talk.hear("ping")
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
        lambda key, value: talk.say(entry=[key, base64.b64encode(value).decode()]), limit_s
    )

    def listen() -> None:
        with contextlib.suppress(*FAILURES):
            while True:
                key, value = talk.hear("entry")
                store.put(key, base64.b64decode(value))

    threading.Thread(target=listen, daemon=True).start()
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
    options._timeout = limit = timedelta(seconds=limit_s)
    group = ProcessGroupGloo(store, rank, 2, options)
    quickest, first, votes = float("inf"), time.monotonic(), 2.0
    while votes == 2:  # both ends have time for another one
        numbers = torch.full((NUMEL,), float(rank + 1))
        began = time.monotonic()
        numbers[0] = float(began - first < REPEAT_S)
        group.allreduce([numbers]).wait(limit)
        quickest = min(quickest, time.monotonic() - began)
        votes = float(numbers[0])
        if not bool((numbers[1:] == 3).all()):
            raise RuntimeError("the sum is wrong: bytes change on the way")
    return quickest, group


class Ring:
    """This node's end of its pairs; `token` tells a neighbour from a stranger."""

    def __init__(self, node: str, address: str) -> None:
        self._node, self._address, self.token = node, address, secrets.token_hex(16)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family)
        self.port: int = self._server.getsockname()[1]
        self._groups: list[object] = []

    def measure(
        self, nodes: Sequence[str], met: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What became of each pair of this node with those that have met."""
        began = time.monotonic()
        for number, left, right in rounds(nodes):
            if self._node not in (left, right) or not {left, right} <= set(met):
                continue
            pair = {"left": left, "right": right, "seconds": None, "offset": None, "text": ""}
            try:
                deadline = began + PAIR_S * (number + 1)
                pair |= self._pair(met[right], self._node == left, deadline)
            except FAILURES as error:
                pair["text"] = failure_text(error)
            yield pair

    def _pair(self, right: Mapping[str, Any], dials: bool, deadline: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._server.settimeout(left_s(deadline))
        # Whoever is busy with another pair still takes the connection.
        address, own = (str(right["host"]), int(right["port"])), (self._address, 0)
        with (
            socket.create_connection(address, CONNECT_S, own) if dials else self._server.accept()[0]
        ) as connection:
            talk = Talk(connection, deadline)
            if dials:
                talk.say(token=right["token"])
                found["offset"] = clock_offset(talk)
            elif not hmac.compare_digest(str(talk.hear("token")), self.token):
                raise RuntimeError("a stranger dialled")
            else:
                answer_pings(talk)
            limit_s = left_s(deadline)
            found["seconds"], group = all_reduce_s(talk, int(not dials), self._address, limit_s)
        self._groups.append(group)
        return found
