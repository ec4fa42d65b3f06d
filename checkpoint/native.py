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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import DTYPES, Values, dtype_of
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.grid import Grid, grid
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.manifest import BYTES_MAX, Manifest
from outlast.checkpoint.source import Source, Tick, array_digest, shard_digest
from outlast.checkpoint.store import Directory, Store, read_whole
from outlast.cluster.errors import Misuse

MANIFEST, GROUP = "manifest.json", "zarr.json"
LATEST = None  # the newest name is the latest
NAME = re.compile(r"step-(\d{12})(\.\d{6,})?")  # the generation, where a store cannot rename
_CRC = 4  # bytes
_ABSENT = (1 << 64) - 1
_PIECE = 1 << 22  # elements read at once at most


def name_of(contents: Contents) -> str:
    """Directory of a step; names sort as steps do."""
    return f"step-{contents.step:012}"


# ---- one shard


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of an array: elements [start, stop), the file's name, and what is where in it.

    Its chunks have one size, also the one at the edge, and follow each other from byte 0 on. Those
    that would lie outside of the array altogether are the last ones and are absent.
    """

    array: Array
    index: int
    start: int
    stop: int
    name: str
    chunks: tuple[tuple[int, int], ...]  # elements [start, stop) of the array
    chunk_bytes: int
    slots: int

    @classmethod
    def of(cls, array: Array, cut: Grid, index: int, span: tuple[int, int]) -> "Shard":
        """The shard of `grid(array.shape)` which holds the elements `span`."""
        axes = list(zip(cut.shape, cut.shard, strict=True))
        at = np.unravel_index(index, [-(-n // s) for n, s in axes]) if axes else ()
        extent = tuple(min(s, n - int(i) * s) for (n, s), i in zip(axes, at, strict=True))
        inner = Grid(extent, cut.chunk, cut.chunk).shards()
        return cls(
            array, index, *span, f"{node(array)}/{'.'.join(['c', *map(str, at)])}",
            tuple((span[0] + begin, span[0] + end) for begin, end in inner),
            prod(cut.chunk) * dtype_of(array.dtype).itemsize,
            prod(s // c for s, c in zip(cut.shard, cut.chunk, strict=True)),
        )  # fmt: skip

    def footer(self) -> bytes:
        """The index of the chunks, which the shape fixes, and its checksum."""
        index = np.full((self.slots, 2), _ABSENT, dtype="<u8")
        size, count = self.chunk_bytes + _CRC, len(self.chunks)
        index[:count] = [(at * size, size) for at in range(count)]
        return index.tobytes() + _crc(index.reshape(-1).view(np.uint8))

    def encode(self, values: Values) -> tuple[NDArray[np.uint8], str]:
        """Its file and its digest: of all elements, then the CRC of every chunk."""
        footer, size = self.footer(), self.chunk_bytes + _CRC
        file = np.zeros(len(self.chunks) * size + len(footer), dtype=np.uint8)
        raw, width, crcs = values.view(np.uint8), values.dtype.itemsize, []
        for row, (begin, end) in zip(self._rows(file), self.chunks, strict=True):
            row[: (end - begin) * width] = raw[
                (begin - self.start) * width : (end - self.start) * width
            ]
            crcs.append(_crc(row[:-_CRC]))
            row[-_CRC:] = np.frombuffer(crcs[-1], dtype=np.uint8)
        file[-len(footer) :] = np.frombuffer(footer, dtype=np.uint8)
        return file, shard_digest(values) + b"".join(crcs).hex()

    def read(self, store: Store, digest: str, start: int, stop: int, out: Values) -> None:
        """Fill `out` with the elements [start, stop), of which it has all, from their chunks."""
        wanted = [at for at, (a, b) in enumerate(self.chunks) if a < stop and b > start]
        size, first = self.chunk_bytes + _CRC, wanted[0]
        whole = len(wanted) == len(self.chunks)
        footer = self.footer() if whole else b""
        file = np.empty(len(wanted) * size + len(footer), dtype=np.uint8)
        store.read_into(self.name, first * size, file)
        if whole:
            if (found := store.size(self.name)) != len(file):
                raise self._corrupt(store, min(found, len(file)), f"{found} bytes in the file")
            if file[len(wanted) * size :].tobytes() != footer:
                raise self._corrupt(store, len(wanted) * size, "the index is not what was written")
        raw, width = out.view(np.uint8), out.dtype.itemsize
        for at, row in zip(wanted, self._rows(file), strict=False):
            crc = digest[32 + 2 * _CRC * at :][: 2 * _CRC]
            if _crc(row[:-_CRC]).hex() != crc or row[-_CRC:].tobytes().hex() != crc:
                raise self._corrupt(store, at * size, f"chunk {at} is not what was written")
            begin, end = self.chunks[at]
            low, high = max(begin, start), min(end, stop)
            raw[(low - start) * width : (high - start) * width] = row[
                (low - begin) * width : (high - begin) * width
            ]
        if (start, stop) == (self.start, self.stop) and shard_digest(out) != digest[:32]:
            raise self._corrupt(store, 0, "the digest is not the manifest's")

    def _rows(self, file: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.chunk_bytes + _CRC
        return file[: len(file) // size * size].reshape(-1, size)[: len(self.chunks)]

    def _corrupt(self, store: Store, offset: int, why: str) -> Exception:
        return corrupt(store.place(self.name), offset, f"{self.array.key}: {why}")


def shards_of(array: Array) -> Iterator[Shard]:
    """All of an array, in order; they tile it."""
    cut = grid(array.shape)
    for index, span in enumerate(cut.shards()):
        yield Shard.of(array, cut, index, span)


def _crc(data: NDArray[np.uint8]) -> bytes:
    return google_crc32c.value(data).to_bytes(_CRC, "little")


def write_shard(store: Store, array: Array, index: int, values: Values) -> str:
    """Write the elements of shard `index`, whole, and read them back; their digest for the note.

    Raises:
        Misuse: the store does not take it, or gives back something else.
    """
    cut = grid(array.shape)
    shard = Shard.of(array, cut, index, cut.shards()[index])
    assert values.dtype == dtype_of(array.dtype), f"{array.key}: {values.dtype}"
    assert values.shape == (shard.stop - shard.start,), f"{array.key}: {values.shape}"
    file, digest = shard.encode(values)
    store.write(shard.name, file)
    back = np.empty_like(file)
    store.read_into(shard.name, 0, back)
    if not np.array_equal(file, back):
        raise Misuse(f"{store.place(shard.name)} gives back other bytes than it got: do not use it")
    return digest


# ---- the metadata of zarr


def node(array: Array) -> str:
    """Path of an array in its group. Its name may have characters that zarr forbids."""
    return f"{_quoted(array.role)}/{_quoted(array.name)}"


def _quoted(name: str) -> str:
    plain = quote(name, safe="")
    if plain.startswith("__") or not plain.strip(".") or plain.endswith(".json"):
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
    for name, data in metadata(contents).items():
        store.write(name, data)


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
        for array in self.contents.arrays:
            if array.dtype not in DTYPES:
                raise corrupt(where, 0, f"{array.key} is of dtype {array.dtype!r}")
        self._unread = metadata(self.contents)
        self._check(GROUP)

    def read(self, array: Array, start: int, stop: int) -> Values:
        """Elements [start, stop), every chunk checked whole before."""
        self._check(f"{node(array)}/{GROUP}")
        out = np.empty(stop - start, dtype=dtype_of(array.dtype))
        cut = grid(array.shape)
        for index, (begin, end) in enumerate(cut.shards()):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                shard = Shard.of(array, cut, index, (begin, end))
                digest = self._manifest.shards[array.key][index]
                shard.read(self.store, digest, low, high, out[low - start : high - start])
        return out

    def _check(self, name: str) -> None:
        """Metadata of zarr is not needed here, but has to be right for those who do."""
        expected = self._unread.get(name)
        if expected is not None and read_whole(self.store, name, len(expected)) != expected:
            raise corrupt(self.store.place(name), 0, "is not what was written")
        self._unread.pop(name, None)

    def stored_digest(self, array: Array) -> str:
        """What the manifest says that `digest` is."""
        return array_digest(digest[:32] for digest in self._manifest.shards[array.key])

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
    store, digests = Directory(directory), dict[tuple[str, int], str]()
    metadata(source.contents)  # what cannot be written is known before anything is

    def copy(array: Array, shard: Shard, tick: Tick) -> None:
        values = source.read(array, shard.start, shard.stop)
        digests[array.key, shard.index] = write_shard(store, array, shard.index, values)
        tick(values.nbytes)

    def finish(tick: Tick) -> None:
        write_metadata(store, source.contents)
        shards = {
            array.key: tuple(
                digests.get((array.key, shard.index)) or _again(store, shard)
                for shard in shards_of(array)
            )
            for array in source.contents.arrays
        }
        store.write(MANIFEST, Manifest(source.contents, shards).to_bytes())

    return [*_copies(source.contents, copy), Item(MANIFEST, 0, finish, final=True)]


def _copies(contents: Contents, copy: Callable[[Array, Shard, Tick], None]) -> Iterator[Item]:
    for array in contents.arrays:
        width = dtype_of(array.dtype).itemsize
        for shard in shards_of(array):
            size = (shard.stop - shard.start) * width
            yield Item(shard.name, size, partial(copy, array, shard))


def _again(store: Store, shard: Shard) -> str:
    """Digest of a shard that was written before this process began."""
    size = (shard.chunk_bytes + _CRC) * len(shard.chunks)
    file = np.empty(size + len(shard.footer()), dtype=np.uint8)
    store.read_into(shard.name, 0, file)
    values = np.concatenate([row[:-_CRC] for row in shard._rows(file)])
    width = dtype_of(shard.array.dtype).itemsize
    whole = values[: (shard.stop - shard.start) * width].view(dtype_of(shard.array.dtype))
    again, digest = shard.encode(whole)
    if not np.array_equal(again, file):
        raise corrupt(store.place(shard.name), 0, "is not what was written: remove the part of it")
    return digest
