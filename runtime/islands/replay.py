"""The contributions that made an outer step, kept on disk, so that it can be made again.

What islands exchange depends on links and deaths, and nothing else of a run does: from the same
contributions follow the same bits. A file holds what one rank used in one round; whoever replays
the round may own any runs. The format is numpy's .npz, whose checksums show a torn file:

    islands             int64 [k], whose contributions counted
    runs-I              of island I: int64 [n, 3], start, stop and bytes of codes of each run
    codes-I             uint8, the codes of all these runs

A round that is made again after a loss writes its files again. If fewer ranks do, files of the
others are left; they are read last, when nothing is missing any more.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from outlast.cluster.errors import Corrupt, Misuse, StateLost
from outlast.layout.run import Run, intersect, subtract
from outlast.runtime.islands.codec import Codec

Piece = tuple[Run, bytes]


class Recorder:
    """Writes the rounds of one island below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(
        self,
        fragment: int,
        step: int,
        islands: Sequence[int],
        pieces: Mapping[int, Sequence[Piece]],
        rank: int,
    ) -> None:
        """Keep what `rank` had of a round, whole or not at all. Every rank does, whatever it owns.

        Args:
            step: after which the fragment was sent.
            islands: whose contributions counted, the same on all ranks.
            pieces: island -> its runs, plain and cut at unit borders, with their codes.
        Raises:
            Misuse: it cannot be written.
        """
        arrays: dict[str, Any] = {"islands": np.array(islands, dtype=np.int64)}
        for island in islands:
            table = [(run.start, run.stop, len(codes)) for run, codes in pieces[island]]
            arrays[f"runs-{island}"] = np.array(table, dtype=np.int64).reshape(-1, 3)
            codes = b"".join(codes for _, codes in pieces[island])
            arrays[f"codes-{island}"] = np.frombuffer(codes, dtype=np.uint8)
        made = io.BytesIO()
        np.savez(made, **arrays)
        path = self._directory / f"{step:09d}-{fragment:04d}-{rank:05d}.npz"
        fresh = path.with_name(f".{path.name}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(made.getbuffer())
            fresh.replace(path)
        except OSError as error:
            raise Misuse(f"{path} cannot be written: {error}") from error


class Replay:
    """Reads what the recorders of all ranks of an island have written.

    Args:
        codec: that made the codes.
    """

    def __init__(self, directory: Path, codec: Codec) -> None:
        self._directory, self._codec = directory, codec

    def rounds(self) -> list[tuple[int, int]]:
        """(step, fragment) of all rounds there are, in order."""
        names = (path.stem.split("-") for path in self._directory.glob("[0-9]*-[0-9]*-[0-9]*.npz"))
        return sorted({(int(step), int(fragment)) for step, fragment, _ in names})

    def round(
        self, fragment: int, step: int, runs: Sequence[Run]
    ) -> tuple[tuple[int, ...], dict[int, list[bytes]]]:
        """Whose contributions counted, and the codes of every island for each of `runs`.

        Args:
            runs: plain, inside units, from grain to grain or to the end of the unit.
        Raises:
            Corrupt: a file is broken.
            StateLost: a part of the round was not kept.
        """
        paths = sorted(self._directory.glob(f"{step:09d}-{fragment:04d}-*.npz"))
        if not paths:
            raise StateLost(f"{self._directory}: nothing of fragment {fragment} of step {step}")
        read = [self._read(path) for path in paths]
        islands = read[0][0]
        kept = [pieces for others, pieces in read if others == islands]  # else another attempt's
        found: dict[int, list[bytes]] = {}
        for island in islands:
            pieces = [piece for each in kept for piece in each[island]]
            found[island] = [self._cut(run, pieces) for run in runs]
        return islands, found

    def _cut(self, run: Run, pieces: Sequence[Piece]) -> bytes:
        """The codes of `run`; the first piece that has an element gives it."""
        left: tuple[Run, ...] = (run,)
        found: list[tuple[int, bytes]] = []
        size, block = self._codec.size, self._codec.block
        for whole, codes in pieces:
            for part in intersect(left, [whole]):
                first, last = part.start - whole.start, part.stop - whole.start
                assert first % block == 0, f"{run} does not begin at a grain"
                assert last % block == 0 or part.stop == whole.stop, f"{run} ends inside a grain"
                found.append((part.start, codes[size(first) : size(last)]))
            left = subtract(left, [whole])
        if left:
            raise StateLost(f"{self._directory}: {left[0]} of this round was not kept")
        return b"".join(codes for _, codes in sorted(found))

    def _read(self, path: Path) -> tuple[tuple[int, ...], dict[int, list[Piece]]]:
        """A file: islands, and the pieces of each."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                islands = tuple(int(island) for island in arrays["islands"])
                tables = {i: (arrays[f"runs-{i}"], arrays[f"codes-{i}"]) for i in islands}
            return islands, {i: self._pieces(*table) for i, table in tables.items()}
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            raise Corrupt(f"{path}: {error}: remove it, or replay without this round") from error

    def _pieces(self, table: NDArray[Any], codes: NDArray[Any]) -> list[Piece]:
        found, at, data = [], 0, codes.tobytes()
        for start, stop, size in table.tolist():
            run = Run.of(start, stop)
            if size != self._codec.size(run.length):
                raise ValueError(
                    f"{size} bytes for {run.length} elements are not {self._codec.name}"
                )
            found.append((run, data[at : at + size]))
            at += size
        if at != len(data):
            raise ValueError(f"{len(data)} bytes of codes where {at} were to be")
        return found
