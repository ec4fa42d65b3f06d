"""A checkpoint as a map from elements to bytes of files: all that most formats need to be read.

A reader of such a format only reads metadata: it says which elements of which array lie where.
Everything else, that they are all there and none twice, intervals, bounds, is done here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run, canonical, intersect, numel


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `run` of a row-major array lie one after the other in `file` from `offset` on.

    A slice of columns is one strided run: its intervals follow each other in the file.
    """

    run: Run
    file: str
    offset: int  # bytes


class PieceSource:
    """See `checkpoint.source.Source`.

    Args:
        pieces: key of every array -> its pieces, in any order.
    Raises:
        Corrupt: the contents contradict themselves; pieces overlap, leave something out, or lie
            outside of their file or their array.
    """

    def __init__(
        self, folder: Folder, contents: Contents, pieces: Mapping[str, Sequence[Piece]]
    ) -> None:
        self.contents, self._folder = contents, folder
        if flaw := next(iter(contents.flaws()), None):
            raise Corrupt(f"{folder.path}: {flaw}")
        sizes: dict[str, int] = {}
        for array in contents.arrays:
            width = dtype_of(array.dtype).itemsize
            mine = pieces.get(array.key, ())
            for piece in mine:
                if piece.file not in sizes:
                    sizes[piece.file] = folder.size(piece.file)
                if not 0 <= piece.offset <= sizes[piece.file] - piece.run.numel * width:
                    raise corrupt(
                        folder.path / piece.file, piece.offset,
                        f"{piece.run.numel * width} bytes of {array.key} are not in the file",
                    )  # fmt: skip
                if piece.run.stop > array.numel:
                    raise corrupt(
                        folder.path / piece.file, piece.offset,
                        f"{piece.run} is outside of {array.key} {array.shape}",
                    )  # fmt: skip
            held = canonical(piece.run for piece in mine)
            if numel(held) != sum(piece.run.numel for piece in mine):
                raise Corrupt(f"{folder.path}: pieces of {array.key} overlap")
            if numel(held) != array.numel:
                raise Corrupt(
                    f"{folder.path}: {array.numel - numel(held)} of {array.numel} elements of "
                    f"{array.key} are in none of its files"
                )
        self._pieces = {a.key: sorted(pieces.get(a.key, ()), key=_start) for a in contents.arrays}

    def read(self, array: Array, start: int, stop: int) -> Values:
        """Elements [start, stop), gathered from their pieces."""
        dtype = dtype_of(array.dtype)
        out = np.empty(stop - start, dtype=dtype)
        for piece in self._pieces[array.key] if stop > start else ():
            if piece.run.start >= stop:
                break
            if piece.run.stop > start:
                for part in intersect([piece.run], [Run.of(start, stop)]):
                    self._fill(out, start, piece, part)
        return out

    def _fill(self, out: Values, start: int, piece: Piece, part: Run) -> None:
        """Read `part` of a piece: whole intervals of its run, or the inside of one."""
        run, width = piece.run, out.dtype.itemsize
        at = part.start - run.start
        if run.count > 1:  # intervals follow each other in the file
            row, inside = divmod(at, run.stride)
            at = row * run.length + inside
        offset, first = piece.offset + at * width, part.start - start
        if part.count == 1 and (run.count == 1 or part.length <= run.length):
            view = out[first : first + part.length]
            self._folder.read_into(piece.file, offset, view.view(np.uint8))
            return
        values = np.empty(part.numel, dtype=out.dtype)
        self._folder.read_into(piece.file, offset, values.view(np.uint8))
        shape, strides = (part.count, part.length), (part.stride * width, width)
        as_strided(out[first:], shape, strides)[:] = values.reshape(shape)

    def stored_digest(self, array: Array) -> str | None:
        """These formats have none."""
        return None

    def close(self) -> None:
        """Close its files."""
        self._folder.close()


def _start(piece: Piece) -> int:
    return piece.run.start
