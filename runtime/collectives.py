"""Collectives that move bytes between the ranks of one generation, and can be interrupted.

Nothing here adds numbers: that is `fold`. Every transfer is an all-to-all of bytes, so NCCL and
gloo are interchangeable, and the backend follows the device of the tensors.

[Note: interrupting] torch's `abort` does nothing on gloo: a survivor of a dead peer would sit in
its collective until the timeout. So a gloo group is interrupted by shutting down its TCP
connections, from any thread. A half-sent message can still leave an operation hanging (gloo
forgets to fail it), therefore nobody blocks in `wait`: it is called in short slices and given up
once the group is interrupted. An operation that was given up still owns its buffers, so the
group and they are parked until it completes. NCCL has `abort` and needs none of this."""

import ctypes
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllToAllOptions, ProcessGroupGloo

from outlast.cluster.errors import GenerationChanged, PeerLost
from outlast.cluster.timing import Timing
from outlast.runtime.rendezvous import RendezvousStore


class Pending:
    """A collective in flight. `buffers` are kept until it is done."""

    def __init__(self, owner: "Communicator", work: Any, *buffers: Tensor) -> None:
        self._owner, self._work, self._buffers = owner, work, buffers

    @property
    def done(self) -> bool:
        """Whether the operation has ended, well or not."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait for the result.

        Raises:
            GenerationChanged: the generation was interrupted meanwhile.
            PeerLost: a peer closed its connection.
        """
        poll = timedelta(seconds=self._owner.timing.poll_s)
        deadline = time.monotonic() + self._owner.timing.collective_s
        ended = False
        while not ended:
            ended = self.done  # asked before: the slice of an operation that just ended may expire
            try:
                self._work.wait(poll)
                break
            except RuntimeError as cause:
                if self._owner.interrupted:
                    raise GenerationChanged("interrupted in a collective") from cause
                if ended or time.monotonic() > deadline:
                    raise PeerLost(str(cause)) from cause
        if self._owner.interrupted:
            # Aborted NCCL kernels "complete" with garbage: the mark was set before the abort.
            raise GenerationChanged("interrupted in a collective")
        self._owner.forget(self)


class Communicator:
    """The group of one generation; rank order is that of its view.

    Args:
        group: a torch process group backend.
        interrupt: makes every pending operation of `group` end or become abandonable.
    """

    def __init__(
        self,
        generation: int,
        group: Any,
        device: torch.device,
        timing: Timing,
        interrupt: Callable[[], None],
    ) -> None:
        self.generation, self.device, self.timing = generation, device, timing
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.interrupted = False
        self._group = group
        self._interrupt = interrupt
        self._pending: set[Pending] = set()

    def exchange(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> Pending:
        """Start an all-to-all of uint8 vectors; `received` and `sent` are bytes per rank."""
        self._check()
        work = self._group.alltoall_base(output, input, received, sent, AllToAllOptions())
        return self._track(Pending(self, work, output, input))

    def gather(self, output: Tensor, input: Tensor) -> Pending:
        """Start an all-gather: uint8 [size * n] receives every rank's uint8 [n], in rank order.

        As an all-to-all of the same bytes to everybody: gloo's own all-gather goes around a ring
        and took 2.5 to 4 times as long for 10 MB on 4 ranks.
        """
        sizes = [input.numel()] * self.size
        return self.exchange(output, input.repeat(self.size), sizes, sizes)

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; the lengths may differ."""
        lengths = torch.empty(8 * self.size, dtype=torch.uint8, device=self.device)
        mine = torch.tensor([len(payload)], device=self.device).view(torch.uint8)
        self.gather(lengths, mine).wait()
        sizes = lengths.view(torch.int64).tolist()
        pad = max([1, *sizes])
        row = bytearray(payload).ljust(pad, b"\0")
        sent = torch.frombuffer(row, dtype=torch.uint8).to(self.device)
        received = torch.empty(pad * self.size, dtype=torch.uint8, device=self.device)
        self.gather(received, sent).wait()
        rows = received.cpu().view(self.size, pad)
        return [rows[rank, :size].numpy().tobytes() for rank, size in enumerate(sizes)]

    def gather_json(self, value: object) -> list[Any]:
        """Every rank's value, in rank order."""
        return [json.loads(body) for body in self.gather_bytes(json.dumps(value).encode())]

    def interrupt(self) -> None:
        """End the generation; callable from any thread, more than once."""
        self.interrupted = True
        self._interrupt()

    def retired(self) -> bool:
        """Whether nothing of an interrupted group is in flight any more, so that it may be
        dropped."""
        return all(pending.done for pending in list(self._pending))

    def drop(self) -> None:
        """Destroy the group of a retired generation, whoever still refers to this object."""
        self._pending.clear()
        self._group = None

    def forget(self, pending: Pending) -> None:
        """Drop a collective whose result has been taken."""
        self._pending.discard(pending)

    def _track(self, pending: Pending) -> Pending:
        self._pending.add(pending)
        return pending

    def _check(self) -> None:
        if self.interrupted:
            raise GenerationChanged("the generation has ended")


class Graveyard:
    """Keeps interrupted groups, with the buffers of what hangs in them, until they are quiet."""

    def __init__(self) -> None:
        self._parked: list[Communicator] = []
        self._pause_s = 0.1
        self._changed = threading.Condition()

    def bury(self, communicator: Communicator) -> None:
        """Interrupt a group and drop it, now or as soon as it is quiet; never blocks.

        Its destructor would wait for an operation that hangs, also while the interpreter ends:
        until the group is quiet it is kept alive beyond that.
        """
        communicator.interrupt()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(communicator))
        with self._changed:
            self._parked.append(communicator)
            if len(self._parked) > 1:
                return
        threading.Thread(target=self._sweep, name="outlast-graveyard", daemon=True).start()

    def close(self, limit_s: float) -> None:
        """Wait until nothing is left, at most so long: a group that is dropped while the
        interpreter ends would abort the process."""
        with self._changed:
            self._changed.wait_for(lambda: not self._parked, limit_s)

    def _sweep(self) -> None:
        # Dropping a group joins gloo's threads (10 ms): off the critical path, in this thread. What
        # hangs ends by gloo's own timeout at the latest.
        while True:
            quiet = [group for group in list(self._parked) if group.retired()]
            for group in quiet:
                group.drop()
                ctypes.pythonapi.Py_DecRef(ctypes.py_object(group))
            with self._changed:
                self._parked = [group for group in self._parked if group not in quiet]
                del quiet
                self._changed.notify_all()
                if not self._parked:
                    return
            time.sleep(self._pause_s)


def connect(
    store: RendezvousStore,
    generation: int,
    rank: int,
    size: int,
    device: torch.device,
    host: str,
    timing: Timing,
) -> Communicator:
    """Join the group of a generation with the backend that serves `device`.

    Args:
        store: rendezvous keys of this group alone.
        host: address of this node on the data plane.
    Raises:
        PeerLost: a peer did not come; a newer generation will say why.
    """
    make = _nccl if device.type == "cuda" else _gloo
    try:
        group, interrupt = make(store, rank, size, device, host, timing)
    except RuntimeError as cause:
        raise PeerLost(f"generation {generation} did not connect: {cause}") from cause
    return Communicator(generation, group, device, timing, interrupt)


def _gloo(
    store: RendezvousStore, rank: int, size: int, device: torch.device, host: str, timing: Timing
) -> tuple[Any, Callable[[], None]]:
    """A gloo group and its interrupt, see [Note: interrupting]."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timedelta(seconds=timing.rebuild_s)
    options._threads = 2
    group = ProcessGroupGloo(store, rank, size, options)
    group.set_timeout(timedelta(seconds=timing.collective_s))
    return group, lambda: shut_down(store)


def shut_down(*stores: RendezvousStore) -> None:
    """Shut down every TCP connection of gloo groups, built or half built; from any thread.

    Which of the process's sockets are a group's? Those with an end whose address a rank published
    in its store.
    """
    published = b"".join(value for store in stores for value in store.values())
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            duplicate = os.dup(int(name))
        except OSError:
            continue  # closed since the listing
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)  # the number was given to a file meanwhile
            continue
        with socket.socket(fileno=duplicate) as end:
            if end.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                ends = [end.getpeername(), end.getsockname()]
                if any(_packed(end.family, address) in published for address in ends):
                    end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # not connected: nothing to shut down


def _packed(family: int, address: tuple[Any, ...]) -> bytes:
    """Port and address as they lie in a sockaddr."""
    port = int(address[1]).to_bytes(2, "big")
    if family == socket.AF_INET:
        return port + socket.inet_pton(socket.AF_INET, address[0])
    return port + bytes(4) + socket.inet_pton(socket.AF_INET6, address[0])


def _nccl(
    store: RendezvousStore, rank: int, size: int, device: torch.device, host: str, timing: Timing
) -> tuple[Any, Callable[[], None]]:
    """An NCCL group in non-blocking mode, whose `abort` ends what is in flight."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options.config.blocking = 0
    options._timeout = timedelta(seconds=timing.collective_s)
    torch.cuda.set_device(device)
    group = ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group, group.abort
