"""Moves the bytes of a recovery, round by round: runs to their owners, units to their decoders.

What a decoder rebuilds in one round travels in the next, beside the inputs of that one. Every rank
posts the messages of all in the same order (`checkpoint/batch.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from outlast.checkpoint.average import Fill, blend
from outlast.checkpoint.batch import Batch, batches, fillings
from outlast.checkpoint.code import Code
from outlast.checkpoint.decode import Decode
from outlast.checkpoint.ladder import Recovery
from outlast.checkpoint.ladder import Transfer as Move
from outlast.checkpoint.records import StateShape
from outlast.layout.run import Run, canonical
from outlast.runtime.collectives import Communicator
from outlast.runtime.shard_state import ShardState
from outlast.runtime.survey import Survey

Units = dict[int, Tensor]  # rebuilt data units of one window


class Transfer:
    """The transfers of one recovery on one rank."""

    def __init__(self, communicator: Communicator, survey: Survey, shape: StateShape) -> None:
        self._communicator, self._survey, self._shape = communicator, survey, shape
        self._rank = communicator.rank
        self._widths = shape.widths

    def run(self, decision: Recovery, state: ShardState, half: int) -> list[Run]:
        """Receive into `half` what this rank lacks; returns the runs that arrived."""
        received: list[Run] = []
        before: tuple[Decode, ...] = ()
        rebuilt: list[Units] = []
        for batch in chain(batches(decision, self._shape), [Batch()]):
            mail = Mail(self._communicator)
            incoming = [*self._post_moves(mail, batch.moves)]
            incoming += self._post_outputs(mail, before, rebuilt)
            self._post_inputs(mail, batch.decodes)
            arrived = mail.deliver()
            for role, run in incoming:
                state.host(half, role, run).view(torch.uint8).copy_(next(arrived))
                received.append(run)
            before = batch.decodes
            rebuilt = [self._decode(d, arrived) for d in before if d.decoder == self._rank]
        for fills in fillings(decision.fills, self._shape):
            received += self._fill(fills, state, half)
        return list(canonical(received))

    def _fill(self, fills: Sequence[Fill], state: ShardState, half: int) -> list[Run]:
        """Average what is lost from the neighbours, which lie with their new owners by now."""
        primary = state.roles[0].name
        mail = Mail(self._communicator)
        for fill in fills:
            for side in fill.sides:
                mine = side.src == self._rank
                data = state.host(half, primary, side.run).view(torch.uint8) if mine else None
                mail.post(side.src, fill.dst, side.run.numel * self._widths[primary], data)
        arrived = mail.deliver()
        filled = [fill for fill in fills if fill.dst == self._rank]
        for fill in filled:
            home = state.host(half, primary, fill.run)
            values = [next(arrived).view(home.dtype) for _ in fill.sides]
            home.copy_(blend(values, [side.weight for side in fill.sides]))
            for role in state.roles[1:]:
                state.host(half, role.name, fill.run).zero_()
        return [fill.run for fill in filled]

    def _post_moves(self, mail: "Mail", moves: Sequence[Move]) -> Iterator[tuple[str, Run]]:
        """Post `moves`; yields (role, run) of what is for this rank."""
        for move in moves:
            for role, width in self._widths.items():
                mine = move.src == self._rank
                data = self._survey.slots[move.source].read(role, move.run) if mine else None
                mail.post(move.src, move.dst, move.run.numel * width, data)
                if move.dst == self._rank:
                    yield role, move.run

    def _post_outputs(
        self, mail: "Mail", decodes: Sequence[Decode], rebuilt: Sequence[Units]
    ) -> Iterator[tuple[str, Run]]:
        """Post what `decodes` gave, those of this rank being `rebuilt`; yields what is for it."""
        mine = iter(rebuilt)
        for decode in decodes:
            units = next(mine) if decode.decoder == self._rank else {}
            for output in decode.outputs:
                size = output.run.numel * self._widths[output.role]
                at = output.at - decode.begin
                data = units[output.unit][at : at + size] if units else None
                mail.post(decode.decoder, output.dst, size, data)
                if output.dst == self._rank:
                    yield output.role, output.run

    def _post_inputs(self, mail: "Mail", decodes: Sequence[Decode]) -> None:
        for decode in decodes:
            for part in decode.inputs:
                mine = part.src == self._rank
                data = self._survey.slots[part.source].read(part.role, part.run) if mine else None
                size = part.run.numel * self._widths[part.role]
                mail.post(part.src, decode.decoder, size, data)
            for row in decode.parity:
                data = None
                if row.src == self._rank:
                    whole = self._survey.parity[row.source].unit(decode.stripe, row.row)
                    data = torch.from_numpy(whole[decode.begin : decode.end])
                mail.post(row.src, decode.decoder, decode.end - decode.begin, data)

    def _decode(self, decode: Decode, arrived: Iterator[Tensor]) -> Units:
        parts: dict[int, list[Tensor]] = {n: [] for n in range(decode.k) if n not in decode.lost}
        for part in decode.inputs:
            parts[part.unit].append(next(arrived))
        data = {unit: _joined(some).numpy() for unit, some in parts.items()}
        parity = {row.row: next(arrived).numpy() for row in decode.parity}
        size = decode.end - decode.begin
        lost = {unit: torch.empty(size, dtype=torch.uint8) for unit in decode.lost}
        code = Code(decode.k, decode.m)
        code.decode(data, parity, {unit: whole.numpy() for unit, whole in lost.items()})
        return lost


class Mail:
    """The messages of one round: every rank posts all of them, in the same order."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        size = communicator.size
        self._sent: list[list[Tensor]] = [[] for _ in range(size)]
        self._expected: list[tuple[int, int, Tensor | None]] = []  # (src, bytes, data if local)
        self._remote = False

    def post(self, src: int, dst: int, size: int, data: Tensor | None) -> None:
        """A message of `size` bytes; `data` (uint8 [size]) at its sender."""
        rank = self._communicator.rank
        self._remote |= src != dst
        if dst == rank:
            self._expected.append((src, size, data))
        elif data is not None:
            self._sent[dst].append(data)

    def deliver(self) -> Iterator[Tensor]:
        """What arrived here, uint8 each, in the order in which it was posted."""
        parts = self._exchange() if self._remote else ()
        taken = [0] * self._communicator.size
        found = []
        for src, size, data in self._expected:
            found.append(parts[src][taken[src] :][:size] if data is None else data)
            taken[src] += size if data is None else 0
        return iter(found)

    def _exchange(self) -> Sequence[Tensor]:
        """One all-to-all; what came from each rank."""
        device = self._communicator.device
        received = [0] * self._communicator.size
        for src, size, data in self._expected:
            received[src] += size if data is None else 0
        output = torch.empty(sum(received), dtype=torch.uint8, device=device)
        self._communicator.exchange(
            output,
            _joined([part for parts in self._sent for part in parts]).to(device),
            received,
            [sum(part.numel() for part in parts) for parts in self._sent],
        ).wait()
        return torch.split(output.cpu(), received)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """uint8 tensors end to end; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([*parts]) if parts else torch.empty(0, dtype=torch.uint8)
