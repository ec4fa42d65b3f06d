"""Moves the bytes of a recovery: first the units that decoders need, then every run to its owner.

Every rank walks the same lists in the same order, so what one sends is what the other expects, and
no message needs a header.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from outlast.checkpoint.code import Code
from outlast.checkpoint.ladder import Decode, Part, Recovery
from outlast.checkpoint.records import StateShape
from outlast.layout.run import Run, canonical
from outlast.runtime.collectives import Communicator
from outlast.runtime.shard_state import ShardState
from outlast.runtime.survey import Survey

Rebuilt = dict[tuple[str, Run], Tensor]


class Transfer:
    """The transfers of one recovery on one rank."""

    def __init__(self, communicator: Communicator, survey: Survey, shape: StateShape) -> None:
        self._communicator, self._survey, self._shape = communicator, survey, shape
        self._rank = communicator.rank

    def run(self, decision: Recovery, state: ShardState, half: int) -> list[Run]:
        """Receive into `half` what this rank lacks; returns the runs that arrived."""
        rebuilt = self._decode(decision.decodes)
        if not decision.transfers and not decision.decodes:
            return []
        sent = self._empty()
        incoming: list[tuple[int, str, Run]] = []
        for move in decision.transfers:
            for role in self._shape.roles:
                if move.src == self._rank:
                    slot = self._survey.slots[move.source]
                    sent[move.dst].append(slot.read(role.name, move.run))
                if move.dst == self._rank:
                    incoming.append((move.src, role.name, move.run))
        for decode in decision.decodes:
            for dst, name, run in decode.outputs:
                if decode.decoder == self._rank:
                    sent[dst].append(self._slice(rebuilt, name, run))
                if dst == self._rank:
                    incoming.append((decode.decoder, name, run))
        arrived = self._swap(sent, [(src, self._size(name, run)) for src, name, run in incoming])
        for (_, name, run), data in zip(incoming, arrived, strict=True):
            state.host(half, name, run).view(torch.uint8).copy_(data)
        return list(canonical(run for _, _, run in incoming))

    def _decode(self, decodes: Sequence[Decode]) -> Rebuilt:
        """Rebuild the units that this rank decodes: (role, run) -> its bytes."""
        if not decodes:
            return {}
        sent = self._empty()
        expected: list[Part] = []
        for decode in decodes:
            for part in (part for unit in decode.inputs for part in unit):
                if part.src == self._rank:
                    slot = self._survey.slots[part.source]
                    sent[decode.decoder].append(slot.read(part.role, part.run))
                if decode.decoder == self._rank:
                    expected.append(part)
        sizes = [(part.src, self._size(part.role, part.run)) for part in expected]
        arrived = iter(self._swap(sent, sizes))
        found: Rebuilt = {}
        for decode in decodes:
            if decode.decoder == self._rank:
                units = [[next(arrived) for _ in unit] for unit in decode.inputs]
                found.update(self._decode_one(decode, units))
        return found

    def _decode_one(self, decode: Decode, units: list[list[Tensor]]) -> Rebuilt:
        source, stripe, row = decode.unit
        nothing = torch.empty(0, dtype=torch.uint8)
        data = [torch.cat(parts or [nothing]).numpy() for parts in units]
        whole = torch.empty(decode.length, dtype=torch.uint8)
        k = len(data) + 1
        parity = {row: self._survey.parity[source].unit(stripe, row)}
        # With one parity row the order of the data does not matter.
        Code(k, 1).decode(dict(enumerate(data)), parity, {k - 1: whole.numpy()})
        sizes = [self._size(name, run) for name, run in decode.lost]
        pieces = torch.split(whole[: sum(sizes)], sizes)
        return dict(zip(decode.lost, pieces, strict=True))

    def _empty(self) -> list[list[Tensor]]:
        return [[] for _ in range(self._communicator.size)]

    def _size(self, role: str, run: Run) -> int:
        return run.numel * self._shape.role(role).itemsize

    def _slice(self, rebuilt: Rebuilt, role: str, run: Run) -> Tensor:
        """Bytes of `run`, which lies within one rebuilt run of its role."""
        width = self._shape.role(role).itemsize
        for (name, home), data in rebuilt.items():
            if name == role and home.start <= run.start and run.stop <= home.stop:
                return data[(run.start - home.start) * width : (run.stop - home.start) * width]
        raise AssertionError(f"{role} {run} was not rebuilt")

    def _swap(self, sent: list[list[Tensor]], expected: list[tuple[int, int]]) -> list[Tensor]:
        """One all-to-all of byte vectors.

        Args:
            expected: (rank, bytes) of what arrives, in the order in which the senders list it.
        Returns:
            what arrived, in the order of `expected`.
        """
        device, size = self._communicator.device, self._communicator.size
        flat = [part for parts in sent for part in parts]
        nothing = torch.empty(0, dtype=torch.uint8)
        received = [sum(n for rank, n in expected if rank == src) for src in range(size)]
        output = torch.empty(sum(received), dtype=torch.uint8, device=device)
        self._communicator.exchange(
            output,
            torch.cat(flat or [nothing]).to(device),
            received,
            [sum(part.numel() for part in parts) for parts in sent],
        ).wait()
        parts = torch.split(output.cpu(), received)
        taken = [0] * size
        found = []
        for rank, count in expected:
            found.append(parts[rank][taken[rank] : taken[rank] + count])
            taken[rank] += count
        return found
