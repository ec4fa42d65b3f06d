"""What has arrived from other islands, checked, until this rank takes it.

Contributions stay encoded and in the pieces in which they came: who sends cuts them by the layouts
of that moment, and either island may have another one by the time they are used. So what matters is
which elements are there. An island that sends a piece again sends the same; one that contradicts
itself harms its own contribution only, of which then the later piece counts. The state of an
island, which is large, is written where it belongs as it comes.

Nothing of what arrives is believed: islands, fragments, steps, edges and sizes are checked before
anything is kept, codes are decoded once, and what is kept is bounded whatever is sent.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outlast.cluster.errors import Misuse
from outlast.cluster.view import field as checked
from outlast.layout.run import Run, covers, intersect, numel, union
from outlast.runtime.islands.codec import Codec

STEPS_TAKEN = 1024
STEPS_KEPT = 2  # of each fragment and island: that of a round and, of who is ahead, of the next
Write = Callable[[str, Run, memoryview], None]


@dataclass(slots=True)
class _Contribution:
    """Of one island to one round: pieces in order of arrival, which lie in one unit each."""

    base: tuple[int, str]
    began: int  # the step at which its island began to take part
    pieces: dict[Run, bytes] = field(default_factory=dict)

    def put(self, piece: Run, codes: bytes, most: int) -> None:
        """Keep a piece instead of those that it hides, and no more than `most` elements in all."""
        hidden = [old for old in self.pieces if piece.start <= old.start and old.stop <= piece.stop]
        for old in hidden:
            del self.pieces[old]
        self.pieces[piece] = codes
        while numel(self.pieces) > most:
            del self.pieces[next(iter(self.pieces))]


@dataclass(slots=True)
class _State:
    """Of one island as of one step, as far as it has come."""

    island: int
    runs: Sequence[Run]
    widths: Mapping[str, int]
    write: Write
    step: int = -1
    there: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    facts: dict[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.facts is not None and all(
            covers(self.there.get(role, ()), self.runs) for role in self.widths
        )

    def begin(self, step: int) -> None:
        """What comes now is of this step; what came before counts only if it is of the same."""
        if step > self.step:
            self.step, self.there, self.facts = step, {}, None

    def take(self, role: str, piece: Run, data: memoryview) -> None:
        """Write what is wanted of a piece."""
        width, wanted = self.widths[role], intersect([piece], self.runs)
        for part in wanted:
            first = (part.start - piece.start) * width
            self.write(role, part, data[first : first + part.numel * width])
        self.there[role] = union(self.there.get(role, ()), wanted)


class Inbox:
    """Thread-safe; `changed` is notified of whatever comes.

    Args:
        fragments: of each fragment the addresses of its units, a run for each.
        islands: how many there are.
    Attributes:
        refused: why something was not kept, newest last.
    """

    def __init__(self, codec: Codec, fragments: Sequence[Sequence[Run]], islands: int) -> None:
        self.changed = threading.Condition()
        self.refused: deque[str] = deque(maxlen=64)
        self._codec, self._fragments, self._islands = codec, fragments, islands
        self._rounds: dict[tuple[int, int], dict[int, _Contribution]] = {}
        self._states: dict[str, _State] = {}

    def put(self, header: Mapping[str, Any], payload: memoryview) -> None:
        """Take a parcel, of which nothing is certain but that its sender belongs to the job."""
        kind = header.get("type")
        try:
            island = checked(header, "island", int, 0, self._islands - 1)
            if kind == "contribution":
                self._contribution(island, header, payload)
            elif kind in ("state", "facts"):
                self._part_of_state(island, header, payload)
            else:
                raise Misuse(f"{kind!r} is none")
        except (Misuse, ValueError) as error:
            self.refused.append(f"a {kind} of island {header.get('island')}: {error}"[:300])

    # ---- contributions

    def covers(self, fragment: int, step: int, island: int, runs: Sequence[Run]) -> bool:
        """Whether all elements of `runs` have come."""
        with self.changed:
            found = self._found(fragment, step, island)
            return found is not None and covers(found.pieces, runs)

    def began(self, fragment: int, step: int, island: int) -> int:
        """The step at which the island of a contribution, of which some is here, had begun."""
        with self.changed:
            return self._rounds[fragment, island][step].began

    def base(self, fragment: int, step: int, island: int) -> tuple[int, str] | None:
        """Weight and name of the version that a contribution changes, if any of it has come."""
        with self.changed:
            found = self._found(fragment, step, island)
            return found.base if found else None

    def codes(self, fragment: int, step: int, island: int, runs: Sequence[Run]) -> list[Tensor]:
        """Decoded values, float32 [n] for each of `runs`, which are cut at grains and covered."""
        with self.changed:
            found = self._found(fragment, step, island)
            pieces = dict(found.pieces) if found else {}
        if not covers(pieces, runs):
            raise ValueError(
                f"fragment {fragment} of step {step}, island {island}: not all is here"
            )
        return [self._decoded(run, pieces) for run in runs]

    def newest(self, fragment: int, island: int) -> int:
        """The newest step of which there is a contribution; -1: none."""
        with self.changed:
            return max(self._rounds.get((fragment, island), ()), default=-1)

    def clear(self, island: int, after: int) -> None:
        """Forget the contributions of an island to rounds later than step `after`, from which it
        goes on with another state: they are of another past."""
        with self.changed:
            for steps in (steps for (_, j), steps in self._rounds.items() if j == island):
                for step, known in [*steps.items()]:
                    if step > after > known.began:
                        del steps[step]

    def _found(self, fragment: int, step: int, island: int) -> _Contribution | None:
        return self._rounds.get((fragment, island), {}).get(step)

    def _decoded(self, run: Run, pieces: Mapping[Run, bytes]) -> Tensor:
        values, size = torch.empty(run.numel), self._codec.size
        for piece, codes in pieces.items():
            low, high = max(run.start, piece.start), min(run.stop, piece.stop)
            if low < high:
                part = memoryview(codes)[size(low - piece.start) : size(high - piece.start)]
                values[low - run.start : high - run.start] = self._codec.decode(part, high - low)
        return values

    def _contribution(self, island: int, header: Mapping[str, Any], codes: memoryview) -> None:
        fragment = checked(header, "fragment", int, 0, len(self._fragments) - 1)
        step, piece = checked(header, "step", int), _piece(header)
        base = checked(header, "weight", int), checked(header, "base", str)
        began = checked(header, "began", int)
        if header.get("codec") != self._codec.name:
            raise Misuse(f"codec {header.get('codec')}, and not {self._codec.name}")
        runs, block = self._fragments[fragment], self._codec.block
        unit = next((u for u in runs if u.start <= piece.start and piece.stop <= u.stop), None)
        if unit is None:
            raise Misuse(f"[{piece.start}, {piece.stop}) is not in one unit of fragment {fragment}")
        edges = {piece.start, piece.stop} - {unit.stop}
        if any((edge - unit.start) % block for edge in edges):
            raise Misuse(f"[{piece.start}, {piece.stop}) is not cut at grains")
        self._codec.decode(codes, piece.numel)  # raises ValueError where nothing encodes to these
        with self.changed:
            steps = self._rounds.setdefault((fragment, island), {})
            known = steps.get(step)
            if known is not None and known.began > began:
                return  # of another past, see `clear`
            if known is None or (known.base, known.began) != (base, began):
                steps[step] = _Contribution(base, began)
            steps[step].put(piece, bytes(codes), 2 * numel(runs))
            # Who takes a state applies what was sent since, when it is here.
            for old in sorted(steps)[: -(STEPS_TAKEN if self._states else STEPS_KEPT)]:
                del steps[old]
            self.changed.notify_all()

    # ---- the state of an island

    def expect(
        self, nonce: str, island: int, runs: Sequence[Run], widths: Mapping[str, int], write: Write
    ) -> None:
        """Take the state that comes from `island` under this nonce, which nobody else knows.

        Args:
            runs: what is wanted of each role.
            widths: bytes of an element, by role.
            write: gets (role, run, bytes) of what is wanted, as it comes, perhaps twice, on the
                thread of `put`; never again after `state` has told that all is there, nor after
                `forget`.
        """
        with self.changed:
            self._states[nonce] = _State(island, tuple(runs), dict(widths), write)

    def state(self, nonce: str) -> dict[str, Any] | None:
        """The facts of an expected state, once all of it has come as of one step."""
        with self.changed:
            state = self._states.get(nonce)
            return state.facts if state is not None and state.whole else None

    def forget(self, nonce: str) -> None:
        """Expect nothing under this nonce any more."""
        with self.changed:
            self._states.pop(nonce, None)

    def _part_of_state(self, island: int, header: Mapping[str, Any], data: memoryview) -> None:
        nonce, step = checked(header, "nonce", str), checked(header, "step", int)
        with self.changed:
            state = self._states.get(nonce)
            if state is None or state.island != island:
                raise Misuse("nobody has asked for it")
            if state.whole or step < state.step:
                return  # it came twice
            if header["type"] == "facts":
                facts: dict[str, Any] = checked(header, "facts", dict)
                state.begin(step)
                state.facts = facts
            else:
                role, piece = checked(header, "role", str), _piece(header)
                width = state.widths.get(role, 0)
                if not width or len(data) != piece.numel * width:
                    raise Misuse(f"{len(data)} bytes of {role} are not {piece.numel} elements")
                state.begin(step)
                state.take(role, piece, data)
            self.changed.notify_all()


def _piece(header: Mapping[str, Any]) -> Run:
    start = checked(header, "start", int)
    return Run.of(start, checked(header, "stop", int, start + 1))
