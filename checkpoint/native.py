"""The native format: one zarr v3 group per step, which any reader of zarr can open.

    step-000000000120/zarr.json          the group, with the metadata of all that is below
                      param/wte.weight/zarr.json
                                       c.0.0       a shard: chunks, each with its CRC-32C, index
                      manifest.json      what is in it, with a digest per shard; written last

The files are encoded here and not by zarr-python: an interval can so be read and written from
several threads at once, a chunk that is missing is an error and never zeros, and errors name the
byte. A shard has one writer, is written whole, once, and is read back.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.grid import Grid, grid
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.manifest import BYTES_MAX, Manifest
from outlast.checkpoint.source import Source, Tick, array_digest, shard_digest
from outlast.checkpoint.store import Directory, Store, read_whole
from outlast.cluster.errors import Corrupt, Misuse

MANIFEST, GROUP = "manifest.json", "zarr.json"
LATEST = None  # the newest name is the latest
NAME = re.compile(r"step-(\d{12})(\.\d{6,})?")  # the generation, where a store cannot rename
_CRC, _XXH = 4, 32  # bytes of the one, hexadecimal digits of the other
_ABSENT = (1 << 64) - 1
_AT_ONCE = 8  # small files: to wait for a store is all that each costs

Bytes = NDArray[np.uint8]


def name_of(contents: Contents) -> str:
    """Directory of a step; names sort as steps do."""
    return f"step-{contents.step:012}"


# ---- one shard


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of an array: its elements [start, stop), and what is where in its file.

    Its chunks have one size, also the one at the edge, and follow each other from byte 0 on. Those
    that would lie outside of the array altogether are the last ones and are absent.
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
    def chunks(self) -> list[tuple[int, int]]:
        """Elements [start, stop) of the array in each of its chunks."""
        axes = zip(self.cut.shape, self.cut.shard, self.at, strict=True)
        extent = tuple(min(size, whole - at * size) for whole, size, at in axes)
        inner = Grid(extent, self.cut.chunk, self.cut.chunk).shards()
        return [(self.start + begin, self.start + end) for begin, end in inner]

    @property
    def record(self) -> int:
        """Bytes of one chunk and its CRC."""
        return prod(self.cut.chunk) * dtype_of(self.array.dtype).itemsize + _CRC

    def footer(self, count: int) -> bytes:
        """The index of `count` chunks, which the shape fixes, and its checksum."""
        slots = prod(s // c for s, c in zip(self.cut.shard, self.cut.chunk, strict=True))
        index = np.full((slots, 2), _ABSENT, dtype="<u8")
        index[:count] = [(at * self.record, self.record) for at in range(count)]
        return index.tobytes() + _crc(index.reshape(-1).view(np.uint8))

    def encode(self, values: Values) -> tuple[Bytes, str]:
        """Its file and its digest: of all elements, then the CRC of every chunk."""
        chunks, width, crcs = self.chunks, values.dtype.itemsize, b""
        footer, raw = self.footer(len(chunks)), values.view(np.uint8)
        file = np.zeros(len(chunks) * self.record + len(footer), dtype=np.uint8)
        for row, (begin, end) in zip(self.rows(file, len(chunks)), chunks, strict=True):
            part = raw[(begin - self.start) * width : (end - self.start) * width]
            row[: len(part)] = part
            crcs += _crc(row[:-_CRC])
            row[-_CRC:] = np.frombuffer(crcs[-_CRC:], dtype=np.uint8)
        file[-len(footer) :] = np.frombuffer(footer, dtype=np.uint8)
        return file, shard_digest(values) + crcs.hex()

    def read(self, store: Store, digest: str, start: int, out: Values) -> None:
        """Fill `out` with elements from `start` on, from the chunks that have any of them."""
        stop, chunks, record = start + len(out), self.chunks, self.record
        wanted = [at for at, (begin, end) in enumerate(chunks) if begin < stop and end > start]
        raw, width, count = out.view(np.uint8), out.dtype.itemsize, max(store.PIECE // record, 1)
        file = np.empty(min(count, len(wanted)) * record, dtype=np.uint8)
        for first in range(0, len(wanted), count):
            rows = self.rows(file, len(wanted[first : first + count]))
            store.read_into(self.name, wanted[first] * record, rows.reshape(-1))
            for at, row in zip(wanted[first:], rows, strict=False):
                crc = digest[_XXH + 2 * _CRC * at :][: 2 * _CRC]
                if not _crc(row[:-_CRC]).hex() == crc == row[-_CRC:].tobytes().hex():
                    raise self._corrupt(store, at * record, f"chunk {at} is not what was written")
                begin, end = max(chunks[at][0], start), min(chunks[at][1], stop)
                part = row[(begin - chunks[at][0]) * width :][: (end - begin) * width]
                raw[(begin - start) * width : (end - start) * width] = part
        if len(out) == self.stop - self.start:
            self._check_whole(store, digest, out)

    def _check_whole(self, store: Store, digest: str, values: Values) -> None:
        count = len(self.chunks)
        at, footer = count * self.record, self.footer(count)
        found = np.empty(len(footer), dtype=np.uint8)
        store.read_into(self.name, at, found)
        if found.tobytes() != footer:
            raise self._corrupt(store, at, "the index is not what was written")
        if (size := store.size(self.name)) != at + len(footer):
            raise self._corrupt(store, at + len(footer), f"{size} bytes are in the file")
        if shard_digest(values) != digest[:_XXH]:
            raise self._corrupt(store, 0, "it is not what the manifest says")

    def rows(self, file: Bytes, count: int) -> Bytes:
        """The first chunks of a file with their CRCs, one a row."""
        return file[: count * self.record].reshape(count, self.record)

    def _corrupt(self, store: Store, offset: int, why: str) -> Corrupt:
        return corrupt(store.place(self.name), offset, f"{self.array.key}: {why}")


def shards_of(array: Array) -> Iterator[Shard]:
    """All of an array, in order; they tile it."""
    cut, spans = _cut(array.shape)
    return (Shard(array, cut, index, *span) for index, span in enumerate(spans))


@lru_cache(maxsize=64)
def _cut(shape: tuple[int, ...]) -> tuple[Grid, list[tuple[int, int]]]:
    return (cut := grid(shape)), cut.shards()


def write_shard(store: Store, array: Array, index: int, values: Values) -> str:
    """Write the elements of shard `index`, whole, and read them back; their digest for the note.

    Raises:
        Misuse: the store does not take it, or gives back something else.
    """
    cut, spans = _cut(array.shape)
    shard = Shard(array, cut, index, *spans[index])
    assert values.dtype == dtype_of(array.dtype), f"{array.key}: {values.dtype}"
    assert values.shape == (shard.stop - shard.start,), f"{array.key}: {values.shape}"
    file, digest = shard.encode(values)
    store.write(shard.name, file)
    back = np.empty(min(len(file), store.PIECE), dtype=np.uint8)
    for at in range(0, len(file), store.PIECE):
        expected = file[at : at + store.PIECE]
        try:
            store.read_into(shard.name, at, back[: len(expected)])
        except Corrupt as error:
            raise Misuse(f"what was written is not there: {error}") from error
        if not np.array_equal(back[: len(expected)], expected):
            raise Misuse(f"{store.place(shard.name)} gives back other bytes: do not use it")
    return digest


def _crc(data: Bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC, "little")


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
    # Types that zarr lacks are stored as the unsigned integers of their size.
    name = array.dtype if dtype.isbuiltin == 1 else f"uint{8 * dtype.itemsize}"
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = little if np.dtype(name).itemsize > 1 else {"name": "bytes"}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": cut.chunk, "codecs": [plain, crc], "index_codecs": [little, crc],
        "index_location": "end",
    }  # fmt: skip
    fill = False if name == "bool" else [0.0, 0.0] if dtype.kind == "c" else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": cut.shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {} if name == array.dtype else {"outlast": {"dtype": array.dtype}},
        "storage_transformers": [],
    }


def write_metadata(store: Store, contents: Contents) -> None:
    """Every zarr.json; Misuse where the store does not take them."""
    texts = metadata(contents)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(store.write, texts.keys(), texts.values()):
            pass


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
    return next((path / name for name in complete(Directory(path))), None)


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
    chunks, dtype = shard.chunks, dtype_of(shard.array.dtype)
    file = np.empty(len(chunks) * shard.record + len(shard.footer(len(chunks))), dtype=np.uint8)
    store.read_into(shard.name, 0, file)
    sizes = [(end - begin) * dtype.itemsize for begin, end in chunks]
    parts = zip(shard.rows(file, len(chunks)), sizes, strict=True)
    again, digest = shard.encode(np.concatenate([row[:size] for row, size in parts]).view(dtype))
    if not np.array_equal(again, file):
        raise corrupt(store.place(shard.name), 0, "it is not what was written: start over")
    return digest
