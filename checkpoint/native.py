"""The native format: one zarr v3 group per step, which any reader of zarr can open.

    step-000000000120/zarr.json          the group, with the metadata of all that is below
                      param/wte.weight/zarr.json
                                       c.0.0       a shard: chunks, each with its CRC-32C, index
                      manifest.json      what is in it, with a digest per shard; written last

zarr-python writes and reads the shards, each of which has one writer, is written whole, once, and
is read back. It does not tell what is missing from zeros, nor where a file is wrong: the manifest
has the sum of every chunk, and with those both is found here.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c
import numpy as np

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.grid import Grid, grid
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.manifest import BYTES_MAX, Manifest
from outlast.checkpoint.pool import at_once
from outlast.checkpoint.source import Source, Tick, array_digest, shard_digest
from outlast.checkpoint.store import Directory, Store, read_whole
from outlast.cluster.errors import Corrupt, Misuse

MANIFEST, GROUP = "manifest.json", "zarr.json"
LATEST = None  # the newest name is the latest
NAME = re.compile(r"step-(\d{12})(\.\d+-[0-9a-f]{8})?")  # who wrote it, see steps
_CRC, _XXH = 4, 32  # bytes of the one, hexadecimal digits of the other
_AXES = 31  # of any numpy, and one is zarr's


def name_of(contents: Contents) -> str:
    """Directory of a step; names sort as steps do."""
    return f"step-{contents.step:012}"


# ---- one shard


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of an array: its elements [start, stop), and what its file has.

    Its chunks have one size, also the one at the edge, and each is an interval of the elements.
    """

    array: Array
    cut: Grid
    index: int
    start: int
    stop: int

    @property
    def at(self) -> tuple[int, ...]:
        """Its place in zarr's grid of shards."""
        counts = [-(-n // s) for n, s in zip(self.cut.shape, self.cut.shard, strict=True)]
        return tuple(map(int, np.unravel_index(self.index, counts))) if counts else ()

    @property
    def name(self) -> str:
        """Its file, from the group on."""
        return f"{node(self.array)}/{'.'.join(['c', *map(str, self.at)])}"

    @property
    def extent(self) -> tuple[int, ...]:
        """Shape of the part of the array that it has."""
        axes = zip(self.cut.shape, self.cut.shard, self.at, strict=True)
        return tuple(min(size, whole - at * size) for whole, size, at in axes)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Elements [start, stop) of the array in each of its chunks."""
        inner = Grid(self.extent, self.cut.chunk, self.cut.chunk).shards()
        return [(self.start + begin, self.start + end) for begin, end in inner]

    @property
    def record(self) -> int:
        """Bytes of one chunk and its CRC."""
        return prod(self.cut.chunk) * dtype_of(self.array.dtype).itemsize + _CRC

    @property
    def size(self) -> int:
        """Bytes of its file: the chunks, and zarr's index of them with a CRC of its own."""
        slots = prod(s // c for s, c in zip(self.cut.shard, self.cut.chunk, strict=True))
        return len(self.chunks) * self.record + (16 * slots + _CRC if self.cut.shape else 0)

    def digest(self, values: Values) -> str:
        """Of its elements: of all, then the CRC of every chunk."""
        parts = (values[begin - self.start : end - self.start] for begin, end in self.chunks)
        return shard_digest(values) + "".join(map(self._sum, parts))

    def _sum(self, part: Values) -> str:
        """The CRC of a chunk, which zeros fill up at the edge."""
        raw = part.view(np.uint8)
        found = google_crc32c.value(raw)
        if rest := self.record - _CRC - len(raw):
            found = google_crc32c.extend(found, bytes(rest))
        return int(found).to_bytes(_CRC, "little").hex()

    def write(self, store: Store, values: Values) -> None:
        """Its file, whole, by one put."""
        from outlast.checkpoint import zarr_array

        count, plain = len(self.chunks), _array(self.array)
        _, box = self._box(0, count, count)
        with store.writing(self.name) as files:
            stored = values.view(plain["data_type"])
            zarr_array.write(files, node(self.array), plain, box, stored)

    def read(self, store: Store, digest: str, start: int, out: Values) -> None:
        """Fill `out` with elements from `start` on."""
        for begin, values in self.pieces(store, digest, start, start + len(out)):
            out[begin - start :][: len(values)] = values
        whole = len(out) == self.stop - self.start
        if whole and shard_digest(out) != digest[:_XXH]:
            raise self._corrupt(store, 0, "it is not what the manifest says")

    def pieces(
        self, store: Store, digest: str | None, start: int, stop: int
    ) -> Iterator[tuple[int, Values]]:
        """Elements [start, stop) in pieces, and where each begins: from the chunks that have any
        of them, which have to match `digest` if it is known."""
        from outlast.checkpoint import zarr_array

        if flaw := self._short(store):
            raise flaw  # zarr would read zeros
        chunks, plain = self.chunks, _array(self.array)
        at = bisect_right(chunks, start, key=itemgetter(0)) - 1
        last = bisect_left(chunks, stop, key=itemgetter(0))
        while at < last:
            end, box = self._box(at, last, max(store.PIECE // self.record, 1))
            with store.reading(self.name) as files:
                try:
                    values = zarr_array.read(files, node(self.array), plain, box)
                except zarr_array.WRONG as error:
                    unlike = self._corrupt(store, 0, f"zarr cannot read it: {error}")
                    raise self.flaw(store, digest) or unlike from error
            first, values = chunks[at][0], values.view(dtype_of(self.array.dtype))
            if digest is not None:
                sums = (self._sum(values[a - first : b - first]) for a, b in chunks[at:end])
                if list(sums) != _sums(digest)[at:end]:
                    unlike = self._corrupt(store, 0, "chunks are not where they were written")
                    raise self.flaw(store, digest) or unlike
            yield max(first, start), values[max(start - first, 0) : stop - first]
            at = end

    def _box(self, first: int, last: int, limit: int) -> tuple[int, tuple[slice, ...]]:
        """The largest box of at most `limit` chunks from `first` on, and the chunk behind it."""
        counts = [-(-n // c) for n, c in zip(self.extent, self.cut.chunk, strict=True)]
        box, size, grows = list[slice](), 1, True
        for axis, whole in reversed(list(enumerate(counts))):
            begin, count = first // prod(counts[axis + 1 :]) % whole, 1
            if grows:  # what is behind this axis is in it altogether
                count = min(whole - begin, (last - first) // size, limit // size)
                size, grows = size * count, count == whole
            side, corner = self.cut.chunk[axis], self.at[axis] * self.cut.shard[axis]
            end = min(corner + (begin + count) * side, self.cut.shape[axis])
            box.append(slice(corner + begin * side, end))
        return first + size, tuple(reversed(box))

    def flaw(self, store: Store, digest: str | None) -> Corrupt | None:
        """What is wrong with its file, without zarr: the first chunk that is not right, the index.

        None where every chunk has its CRC, and those of `digest` if it is known.
        """
        if flaw := self._short(store):
            return flaw
        row, end = np.empty(self.record, dtype=np.uint8), len(self.chunks) * self.record
        for offset in range(0, end, self.record):
            store.read_into(self.name, offset, row)
            found = self._sum(row[:-_CRC])
            right = found == row[-_CRC:].tobytes().hex()
            if not right or (digest is not None and found not in _sums(digest)):
                return self._corrupt(store, offset, "this chunk is not what was written")
        index = np.empty(self.size - end, dtype=np.uint8)
        store.read_into(self.name, end, index)
        if len(index) and google_crc32c.value(index[:-_CRC]) != int(index[-_CRC:].view("<u4")[0]):
            return self._corrupt(store, end, "the index is not what was written")
        return None

    def _short(self, store: Store) -> Corrupt | None:
        if (size := store.size(self.name)) == self.size:
            return None
        why = f"the file has {size} bytes and not {self.size}"
        return self._corrupt(store, min(size, self.size), why)

    def _corrupt(self, store: Store, offset: int, why: str) -> Corrupt:
        return corrupt(store.place(self.name), offset, f"{self.array.key}: {why}")


def _sums(digest: str) -> list[str]:
    """The CRCs of the chunks in a digest."""
    return [digest[at : at + 2 * _CRC] for at in range(_XXH, len(digest), 2 * _CRC)]


def shards_of(array: Array) -> Iterator[Shard]:
    """All of an array, in order; they tile it."""
    cut, spans = _cut(array.shape)
    return (Shard(array, cut, index, *span) for index, span in enumerate(spans))


@lru_cache(maxsize=64)
def _cut(shape: tuple[int, ...]) -> tuple[Grid, list[tuple[int, int]]]:
    return (cut := grid(shape)), cut.shards()


def write_shard(store: Store, array: Array, index: int, values: Values) -> str:
    """Write the elements of shard `index`, whole, and read them back; their digest for the note.
    They are durable when the store has settled.

    Raises:
        Misuse: the store does not take it, or gives back something else.
    """
    cut, spans = _cut(array.shape)
    shard = Shard(array, cut, index, *spans[index])
    assert values.dtype == dtype_of(array.dtype), f"{array.key}: {values.dtype}"
    assert values.shape == (shard.stop - shard.start,), f"{array.key}: {values.shape}"
    digest = shard.digest(values)
    shard.write(store, values)
    try:
        flaw = shard.flaw(store, digest)
    except Corrupt as error:
        flaw = error
    if flaw is not None:
        raise Misuse(f"what was written is not there, do not use this storage: {flaw}")
    return digest


# ---- the metadata of zarr


def node(array: Array) -> str:
    """Path of an array in its group. Its name may have characters that zarr forbids."""
    return f"{_quoted(array.role)}/{_quoted(array.name)}"


def _quoted(name: str) -> str:
    plain = quote(name, safe="")
    if plain.startswith("__") or not plain.strip(".") or plain in (GROUP, MANIFEST):
        plain = f"%{ord(plain[0]):02X}{plain[1:]}" if plain else "%"
    if len(plain) > 255:
        raise Misuse(f"the name {name[:100]!r}... is too long to be that of a file")
    return plain


def metadata(contents: Contents) -> dict[str, bytes]:
    """The text of every zarr.json, by name."""
    nodes = {_quoted(role): _group() for role in dict.fromkeys(a.role for a in contents.arrays)}
    nodes |= {node(array): _array(array) for array in contents.arrays}
    inline = {"kind": "inline", "must_understand": False, "metadata": nodes}
    every = {f"{path}/{GROUP}": node for path, node in nodes.items()}
    every[GROUP] = _group() | {"consolidated_metadata": inline}
    return {name: json.dumps(plain).encode() for name, plain in every.items()}


def _group() -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _array(array: Array) -> dict[str, Any]:
    cut, dtype = grid(array.shape), dtype_of(array.dtype)
    if len(array.shape) > _AXES:
        raise Misuse(f"{array.key} has {len(array.shape)} axes: numpy, and so zarr, has {_AXES}")
    # Types that zarr lacks are stored as the unsigned integers of their size.
    name = array.dtype if dtype.isbuiltin == 1 else f"uint{8 * dtype.itemsize}"
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = little if np.dtype(name).itemsize > 1 else {"name": "bytes"}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": cut.chunk, "codecs": [plain, crc], "index_codecs": [little, crc],
        "index_location": "end",
    }  # fmt: skip
    # A scalar is one chunk without an index, of which zarr-python writes none.
    sharded = [{"name": "sharding_indexed", "configuration": sharding}]
    fill = False if name == "bool" else [0.0, 0.0] if dtype.kind == "c" else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": cut.shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": sharded if array.shape else [plain, crc],
        "attributes": {} if name == array.dtype else {"outlast": {"dtype": array.dtype}},
        "storage_transformers": [],
    }


def write_metadata(store: Store, contents: Contents, tick: Tick = lambda size: None) -> None:
    """Every zarr.json; Misuse where the store does not take them."""

    def write(name: str, text: bytes) -> None:
        store.write(name, text)
        tick(len(text))

    at_once(partial(write, *each) for each in metadata(contents).items())


# ---- a whole step


class NativeSource:
    """A step in `store`, open for reading: see `checkpoint.source.Source`.

    Raises:
        Corrupt: there is none, or its manifest or the metadata of zarr are not what was written.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        where = store.place(MANIFEST)
        self._manifest = Manifest.from_bytes(read_whole(store, MANIFEST, BYTES_MAX), where)
        self.contents = self._manifest.contents
        try:
            self._unread = metadata(self.contents)
        except (Misuse, ValueError) as cause:  # a dtype or a name that nobody can have written
            raise corrupt(where, 0, str(cause)) from cause
        self._check(GROUP)

    def read(self, array: Array, start: int, stop: int) -> Values:
        """Elements [start, stop), every chunk checked whole before."""
        self._check(f"{_quoted(array.role)}/{GROUP}")
        self._check(f"{node(array)}/{GROUP}")
        out = np.empty(stop - start, dtype=dtype_of(array.dtype))
        cut, spans = _cut(array.shape)
        first = bisect_right(spans, start, key=itemgetter(0)) - 1
        last = bisect_left(spans, stop, key=itemgetter(0))
        for index in range(first, last) if start < stop else ():
            shard = Shard(array, cut, index, *spans[index])
            begin, end = max(shard.start, start), min(shard.stop, stop)
            digest = self._manifest.shards[array.key][index]
            shard.read(self.store, digest, begin, out[begin - start : end - start])
        return out

    def _check(self, name: str) -> None:
        """Metadata of zarr is not needed here, but has to be right for those who do."""
        expected = self._unread.get(name)
        if expected is not None and read_whole(self.store, name, len(expected)) != expected:
            raise corrupt(self.store.place(name), 0, "is not what was written")
        self._unread.pop(name, None)

    def stored_digest(self, array: Array) -> str:
        """What the manifest says that `digest` is."""
        return array_digest(digest[:_XXH] for digest in self._manifest.shards[array.key])

    def close(self) -> None:
        """Close its files."""
        self.store.close()


def find(path: Path) -> Path | None:
    """A step itself, or the newest one in a directory of steps."""
    if (path / MANIFEST).is_file() and (path / GROUP).is_file():
        return path
    names = complete(Directory(path)) if path.is_dir() else []
    return path / names[0] if names else None


def complete(store: Store) -> list[str]:
    """Names of the steps in a store that have a manifest, newest first."""
    found = (name for name in store.children() if NAME.fullmatch(name))
    return sorted((name for name in found if store.holds(f"{name}/{MANIFEST}")), reverse=True)


def open(path: Path, follow: bool = False) -> NativeSource:
    """The step in the directory `path`; Corrupt where it is none."""
    return NativeSource(Directory(path, follow))


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """One item per shard, and the manifest with the metadata at the end."""
    store, digests = Directory(directory), dict[str, str]()
    arrays = source.contents.arrays
    metadata(source.contents)  # what cannot be written is known before anything is
    for torn in directory.rglob("c*.partial"):  # zarr was killed before it gave it its name
        torn.unlink()

    def copy(shard: Shard, tick: Tick) -> None:
        values = source.read(shard.array, shard.start, shard.stop)
        digests[shard.name] = write_shard(store, shard.array, shard.index, values)
        tick(values.nbytes)

    def finish(tick: Tick) -> None:
        write_metadata(store, source.contents)
        shards = {
            array.key: tuple(
                digests.get(shard.name) or _again(store, shard) for shard in shards_of(array)
            )
            for array in arrays
        }
        store.write(MANIFEST, Manifest(source.contents, shards).to_bytes())

    items = [
        Item(shard.name, (shard.stop - shard.start) * dtype_of(array.dtype).itemsize,
             partial(copy, shard))
        for array in arrays for shard in shards_of(array)
    ]  # fmt: skip
    return [*items, Item(MANIFEST, 0, finish, final=True)]


def _again(store: Store, shard: Shard) -> str:
    """Digest of a shard that an earlier try wrote."""
    values = np.empty(shard.stop - shard.start, dtype=dtype_of(shard.array.dtype))
    for begin, piece in shard.pieces(store, None, shard.start, shard.stop):
        values[begin - shard.start :][: len(piece)] = piece
    return shard.digest(values)
