"""Arrays that tensor-parallel ranks hold slices of, each of which lies in pieces of files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.patterns import Merge, Part, Patterns, Shape, placed
from outlast.checkpoint.formats.pickles import TensorRef
from outlast.checkpoint.formats.pieces import Piece, PieceSource
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run


@dataclass(frozen=True, slots=True)
class Located:
    """Elements [start, stop) of a rank's slice are those of a tensor from `skip` on."""

    rank: int
    start: int
    stop: int
    ref: TensorRef
    skip: int = 0


class Merges:
    """How slices make wholes, by name; the whole itself where there is one rank.

    Args:
        info: `universal_checkpoint_info` of the checkpoint.
    """

    def __init__(self, ranks: int, info: Mapping[str, Any]) -> None:
        self.ranks, self._patterns = ranks, Patterns(info) if ranks > 1 else None
        self._known: dict[tuple[str, tuple[Shape, ...]], Merge] = {}

    def of(self, name: str, shapes: Sequence[Shape]) -> Merge:
        """The merge of a tensor from its shapes on the ranks."""
        key = name, tuple(shapes)
        if key not in self._known:
            if self._patterns:
                self._known[key] = self._patterns.merge(name, shapes)
            else:
                size = prod(shapes[0])
                whole = (Part(0, 0, Run.of(0, size)),) if size else ()
                self._known[key] = Merge(shapes[0], (whole,), False, {})
        return self._known[key]

    def averaged(self) -> set[str]:
        """Names whose copies are averaged."""
        return {name for (name, _), merge in self._known.items() if merge.averaged}

    def unused(self) -> set[str]:
        """Patterns that no name has matched."""
        return self._patterns.unused if self._patterns else set()


class Slices:
    """Arrays, as they are found piece by piece."""

    def __init__(self, merges: Merges) -> None:
        self._merges = merges
        self.arrays: dict[str, Array] = {}
        self._copies: list[dict[str, list[Piece]]] = [{}]

    def add(
        self, role: str, name: str, shapes: Sequence[Shape], dtype: str, found: Iterable[Located]
    ) -> None:
        """An array of slices of `shapes`; `found` has every element of each.

        Raises:
            Corrupt: the slices do not fit each other, or a tensor is of another dtype.
        """
        merge = self._merges.of(name, shapes)
        array = Array(role, name, merge.shape, dtype)
        self.arrays[array.key] = array
        found = list(found)
        for index, parts in enumerate(merge.copies):
            if index == len(self._copies):
                self._copies.append({})
            self._copies[index][array.key] = list(_pieces(parts, found, dtype))

    def sources(self, folder: Folder, contents: Contents) -> list[PieceSource]:
        """The source of `contents`, which has these arrays, and those of their further copies."""
        first, *others = self._copies
        bare = replace(contents, groups=(), aliases={})
        return [
            PieceSource(folder, contents, first),
            *(
                PieceSource(
                    folder, replace(bare, arrays=tuple(self.arrays[key] for key in pieces)), pieces
                )
                for pieces in others
            ),
        ]


def _pieces(parts: Iterable[Part], found: Iterable[Located], dtype: str) -> Iterator[Piece]:
    parts = tuple(parts)
    for at in found:
        if at.ref.dtype != dtype:
            raise corrupt(at.ref.file, at.ref.offset, f"{at.ref.dtype} where others have {dtype}")
        for start, run in placed(parts, at.rank, at.start, at.stop):
            yield at.ref.piece(run, at.skip + start - at.start)


class MergedSource:
    """See `checkpoint.source.Source`: what ranks hold copies of is read from all of them.

    Args:
        copies: the first has everything; the others what there are more copies of.
        averaged: names whose copies are averaged, as DeepSpeed does; others have to be equal.
    """

    def __init__(self, copies: list[PieceSource], averaged: set[str]) -> None:
        self.contents = copies[0].contents
        self._copies, self._averaged = copies, averaged

    def read(self, array: Array, start: int, stop: int) -> Values:
        """Elements [start, stop); Corrupt, too, where copies differ that have to be equal."""
        values, *others = (
            source.read(array, start, stop)
            for source in self._copies
            if array.key in source.contents.by_key
        )
        if others and array.name in self._averaged:
            total: Any = sum(others, start=values)
            return np.asarray(total / total.dtype.type(1 + len(others)))
        if any(other.tobytes() != values.tobytes() for other in others):
            raise Corrupt(f"{array.key}: its copies on the tensor-parallel ranks differ")
        return values

    def stored_digest(self, array: Array) -> str | None:
        """DeepSpeed has none."""
        return None

    def close(self) -> None:
        """Close its files."""
        self._copies[0].close()
